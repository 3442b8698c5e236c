"""What lies in a checkpoint's folder or repository, before anything is made of it."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files


def stored_config(name: str | os.PathLike, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's own config.json says, whatever the caller puts in its place; empty if there is none."""
    try:
        stored = PreTrainedConfig.get_config_dict(name, **place_of(options))[0]
    except (OSError, ValueError, TypeError, AttributeError):  # what is wrong with it, loading itself will say
        return {}
    return stored if isinstance(stored, dict) else {}


def stored_bytes(name: str | os.PathLike, options: Mapping[str, Any]) -> int | None:
    """Length of a checkpoint's weight files, which are downloaded if need be; None if there are none."""
    if options.get("state_dict") is not None or options.get("gguf_file") is not None:
        return None
    variant = f".{options['variant']}" if options.get("variant") else ""
    whole, index = f"model{variant}.safetensors", f"model.safetensors.index{variant}.json"
    if options.get("use_safetensors") is False:
        whole, index = f"pytorch_model{variant}.bin", f"pytorch_model.bin.index{variant}.json"
    place = place_of(options)
    silent = {
        f"_raise_exceptions_for_{error}": False for error in ("gated_repo", "missing_entries", "connection_errors")
    }
    if path := cached_file(name, whole, **place, **silent):
        return os.path.getsize(path)
    if path := cached_file(name, index, **place, **silent):
        return sum(os.path.getsize(shard) for shard in get_checkpoint_shard_files(name, path, **place)[0])
    return None


def place_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `from_pretrained` was given, that which says where the files are."""
    names = ("cache_dir", "token", "revision", "local_files_only", "subfolder")
    return {name: options[name] for name in names if options.get(name) is not None}
