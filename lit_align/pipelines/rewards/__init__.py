"""Which tokens of a wrong response are unaligned: corrections, reward model, weights."""
