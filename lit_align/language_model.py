"""Load, save and identify a causal language model and its tokenizer.

A model is named by a local folder, by a hub id, or by the alias of the embedded default model
(`lit_align.gguf_alias`). A folder or an alias makes no network call.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_align.claimed_sizes import check_claims
from lit_align.config_limits import check_config_file, check_tokenizer_files
from lit_align.errors import LIBRARY_ERRORS, ModelError
from lit_align.gguf_alias import ALIAS, alias_dir
from lit_align.shards import refuse_shards
from lit_align.stored_tensors import StoredTensor, tensors_of_folder, weight_files

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
HASH_CHUNK_BYTES = 1 << 22
MODEL_SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".py"}
NF4_NEEDS = (
    "pip install 'lit-align[qlora]' on a machine with a device that bitsandbytes knows, or train "
    "without quantization"
)

# What transformers raises at a folder whose files are not what they should be.
UNUSABLE: tuple[type[Exception], ...] = (*LIBRARY_ERRORS, SafetensorError, StrictDataclassError)

_fingerprints: dict[tuple[tuple[str, int, int], ...], str] = {}


def load_language_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    nf4_on: torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in evaluation mode on the CPU, and its tokenizer.

    The model carries two attributes that masks and deltas are checked against: `base_fingerprint`
    (str, see `fingerprint`) and `base_dir` (Path of the folder that it was read from).

    Args:
        name_or_path: local folder, hub id or alias.
        dtype: of the weights.
        attn_implementation: of transformers.
        trust_remote_code: let the model's folder bring code of its own.
        nf4_on: hold the linear layers, all but the head, in 4 bits (NF4, QLoRA's double
            quantisation) on this device; they multiply in `dtype`.

    Raises:
        ModelError: The name leads nowhere, the folder is not a causal LM with safetensors, or NF4
            cannot be had here.
    """
    quantized = {} if nf4_on is None else _nf4_settings(nf4_on, dtype)
    folder = resolve_model(name_or_path, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    base_fingerprint = fingerprint(folder)
    try:
        model: Any = pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            **quantized,
        )
    except ModelError as error:
        if nf4_on is None or not isinstance(error.__cause__, ImportError | RuntimeError):
            raise
        reason = error.__cause__
        raise ModelError(
            f"NF4 weights cannot be made on {nf4_on}: {reason}; {NF4_NEEDS}"
        ) from error
    if nf4_on is not None and nf4_on.type == "cpu":
        _keep_trainable(model)
    model.base_fingerprint = base_fingerprint
    model.base_dir = folder
    return model.eval(), tokenizer


def pretrained(folder: Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """The causal language model of a folder, whole.

    Args:
        folder: of the model.
        trust_remote_code: let it bring code of its own.
        options: of `from_pretrained`.

    Raises:
        ModelError: the folder is not a causal LM's, is damaged, asks for more than its files hold,
            or lacks a tensor that the model has, which transformers would fill with random numbers.
    """
    check_config_file(folder)
    try:
        if not trust_remote_code:
            check_claims(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except UNUSABLE as error:
        raise ModelError(f"cannot load a causal language model from {folder}: {error}") from error
    model, report = loaded
    if lacking := sorted(report["missing_keys"]):
        raise ModelError(f"{folder} lacks {lacking[0]!r}, which its model has")
    return model


def _nf4_settings(device: torch.device, dtype: Any) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"NF4 weights need bitsandbytes, which is not installed: {NF4_NEEDS}")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _keep_trainable(model: Any) -> None:
    """Leave 4-bit weights as they are loaded.

    bitsandbytes re-packs them at the first forward of an evaluation on some CPUs, for a kernel
    without a backward: gradients would be wrong from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_tokenizer(
    name_or_path: str | Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; one without a padding token pads with its end-of-sequence token.

    Raises:
        ModelError: The name leads nowhere, the folder has no tokenizer, or it has no end token.
    """
    folder = resolve_model(name_or_path, trust_remote_code=trust_remote_code)
    check_config_file(folder)  # transformers reads it to find out the tokenizer's class
    check_tokenizer_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        # tokenizers says what is wrong with a file by an `Exception` of no class of its own.
        if type(error) is not Exception and not isinstance(error, UNUSABLE):
            raise
        raise ModelError(f"cannot load a tokenizer from {folder}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder}: the tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_model(name_or_path: str | Path, *, trust_remote_code: bool = False) -> Path:
    """The local folder of a model: a folder as it is, an alias or a hub id from its cache.

    Only a hub id may touch the network; the variable HF_HUB_OFFLINE keeps even that from it.

    Raises:
        ModelError: It is neither a folder nor an alias nor a hub id that can be had.
    """
    name = str(name_or_path)
    if name == ALIAS:
        return alias_dir()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    # An id is `name` or `owner/name`: anything else is meant as a path, so the hub is not asked.
    if isinstance(name_or_path, Path) or name[:1] in {".", "~", "/"} or name.count("/") > 1:
        raise ModelError(f"{name}: no such folder")
    patterns = [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name} is neither a local folder nor the alias {ALIAS}, and the hub does not give "
            f"it: {error}"
        ) from error


def save_language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> Path:
    """Write model and tokenizer as an ordinary Hugging Face folder, whole or not at all.

    An older model of that name is replaced; a folder that holds anything else, even beside a model,
    is not touched.

    Raises:
        ModelError: The folder exists and holds something else than a model, or the model has
            adapters or is sharded.
    """
    refuse_shards(model, f"no model at {folder}")
    if hasattr(model, "peft_config"):
        raise ModelError("the model has adapters: merge them (merge_adapters), or save them alone")
    folder = Path(folder)
    replaces = folder.exists()
    if replaces and not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise ModelError(f"{folder} is not empty and holds no model; not replaced")
    if others := sorted(p.name for p in folder.glob("*") if p.suffix not in MODEL_SUFFIXES):
        raise ModelError(f"{folder} is not of a model alone, it holds {others[0]!r}; not replaced")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "new"
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        if replaces:
            folder.rename(Path(scratch) / "old")
        fresh.rename(folder)
    return folder


def fingerprint(folder: str | Path) -> str:
    """SHA-256 (hex) of the tensors of a model folder: names, dtypes, shapes and bytes.

    How the tensors are spread over files and ordered within them does not count. Kept in memory
    for as long as path, size and modification time of the files stay the same.

    Raises:
        ModelError: The folder has no safetensors, or a file is damaged or incomplete.
    """
    files = weight_files(folder)
    key = tuple((str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    if key not in _fingerprints:
        digest = hashlib.sha256()
        for _, entry in sorted(tensors_of_folder(folder).items()):
            digest.update(json.dumps([entry.name, entry.dtype, entry.shape]).encode())
            _hash_range(digest, entry)
        _fingerprints[key] = digest.hexdigest()
    return _fingerprints[key]


def _hash_range(digest: Any, tensor: StoredTensor) -> None:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin)
        left = tensor.end - tensor.begin
        while left:
            block = stream.read(min(HASH_CHUNK_BYTES, left))
            if not block:
                raise ModelError(f"{tensor.file} changed while it was read")
            digest.update(block)
            left -= len(block)
