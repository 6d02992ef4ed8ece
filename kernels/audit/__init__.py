"""What can be proved about a Triton kernel without a GPU: values, compiled code, bytes moved."""
