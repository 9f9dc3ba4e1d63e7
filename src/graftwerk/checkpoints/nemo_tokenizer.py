"""The tokenizer that travels in a `.nemo`: artifacts `<uuid>_<file>`, named in the config."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwerk.checkpoints.archive import Files
from graftwerk.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARTIFACT = "nemo:"
FILE_LIMIT = 1 << 28  # bytes of one tokenizer file
# Files by which a tokenizer of transformers is read again, the vocabulary first.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)


def artifacts(values: Mapping[str, Any], files: Files) -> dict[str, str]:
    """Tokenizer files: their own name -> the member that holds them.

    The names come from the archive; they are only ever looked up in it.
    """
    section = values.get("tokenizer")
    found: dict[str, str] = {}
    for key, value in _named(section if isinstance(section, dict) else {}):
        member = value.removeprefix(ARTIFACT).removeprefix("./")
        if member in files.members:
            own = member.rpartition("/")[2].partition("_")[2] if value != member else member
            found[_own_name(key, own or member)] = member
    for name in TOKENIZER_FILES:
        if name in files.members:
            found.setdefault(name, name)
    return found


def _named(section: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and item:
                yield key, item


def _own_name(key: str, file: str) -> str:
    """The name under which transformers looks for it: NeMo keeps whatever the file was called."""
    known = {"vocab_file": "vocab.json", "merge_file": "merges.txt", "model": "tokenizer.model"}
    if file in TOKENIZER_FILES or key not in known:
        return file
    return "vocab.txt" if key == "vocab_file" and file.endswith(".txt") else known[key]


def vocabulary_size(values: Mapping[str, Any], files: Files) -> int | None:
    """How many tokens the tokenizer has; None where none that can be counted travels along."""
    found = artifacts(values, files)
    for name, path in (
        ("tokenizer.json", ("model", "vocab")),
        ("vocab.json", ()),
        ("vocab.txt", ()),
    ):
        if name not in found:
            continue
        try:
            if name == "vocab.txt":
                return len(_words(files, found[name])) + len(sentinels(values))
            content = json.loads(files.read(found[name], FILE_LIMIT))
            ids = [token["id"] for token in content.get("added_tokens", ())] if path else []
            for key in path:
                content = content[key]
            entries = content.values() if isinstance(content, dict) else range(len(content))
            more = 0 if path else len(sentinels(values))
            return max([*ids, *entries]) + 1 + more
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
    return None


def start_token(values: Mapping[str, Any], files: Files) -> int | None:
    """The id with which NeMo's own T5 begins a target: its tokenizer's first special token.

    None where the tokenizer is none of NeMo's for such models (word pieces, GPT-2's).
    """
    found = artifacts(values, files)
    try:
        if "tokenizer.json" not in found and "vocab.txt" in found:
            return _words(files, found["vocab.txt"]).index("[CLS]")
        if "tokenizer.json" not in found and "vocab.json" in found:
            return int(json.loads(files.read(found["vocab.json"], FILE_LIMIT))["<|endoftext|>"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return None


def sentinels(values: Mapping[str, Any]) -> list[str]:
    """The tokens that NeMo's T5 puts behind the vocabulary (`MegatronT5Model._build_vocab`)."""
    section = values.get("tokenizer")
    count = section.get("num_sentinel_tokens") if isinstance(section, dict) else None
    if type(count) is not int or not 0 < count <= 10_000:
        return []
    return [f"<extra_id_{number}>" for number in range(count)]


def _words(files: Files, member: str) -> list[str]:
    return files.read(member, FILE_LIMIT).decode().splitlines()


def load(values: Mapping[str, Any], files: Files) -> "PreTrainedTokenizerBase":
    """The tokenizer of an opened `.nemo`; none of its code is run.

    Raises:
        UserError: where there is none, or none that transformers reads.
    """
    found = artifacts(values, files)
    with tempfile.TemporaryDirectory(prefix="graftwerk-") as folder:
        for name in TOKENIZER_FILES:
            if name in found:
                Path(folder, name).write_bytes(files.read(found[name], FILE_LIMIT))
        try:
            return _read(Path(folder), found, values)
        except UserError:
            raise
        except Exception as error:  # transformers and its libraries raise many kinds
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"{files.path}: its tokenizer cannot be read: {text}") from None


def _read(
    folder: Path, found: Mapping[str, str], values: Mapping[str, Any]
) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

    if "tokenizer.json" in found:
        if "tokenizer_config.json" not in found:
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if {"vocab.json", "merges.txt"} <= found.keys():
        return _with_sentinels(GPT2Tokenizer.from_pretrained(folder, local_files_only=True), values)
    if "vocab.txt" in found:
        return _word_pieces(folder, values)
    if {"tokenizer.model", "spiece.model"} & found.keys():
        return _sentencepiece(folder, found, values)
    section = values.get("tokenizer")
    name = section.get("type") if isinstance(section, dict) else None
    said = f"it names {name!r}, which does not travel in it" if name else "it holds none"
    raise UserError(
        f"no tokenizer that can be read ({said}): give its folder or Hub name where the stage "
        f"takes one, or convert the checkpoint together with its tokenizer"
    )


def _word_pieces(folder: Path, values: Mapping[str, Any]) -> "PreTrainedTokenizerBase":
    """BERT's tokenizer as NeMo's T5 has it: `[CLS]` begins a text and `[SEP]` ends it."""
    from transformers import BertTokenizer

    section = values.get("tokenizer")
    lower = isinstance(section, dict) and "lower" in str(section.get("type")).lower()
    tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True, do_lower_case=lower)
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    return _with_sentinels(tokenizer, values)


def _with_sentinels(
    tokenizer: "PreTrainedTokenizerBase", values: Mapping[str, Any]
) -> "PreTrainedTokenizerBase":
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(name, special=True) for name in sentinels(values)])
    return tokenizer


def _sentencepiece(
    folder: Path, found: Mapping[str, str], values: Mapping[str, Any]
) -> "PreTrainedTokenizerBase":
    """A SentencePiece model: transformers converts it if the package `sentencepiece` is there."""
    from transformers import AutoTokenizer

    t5 = isinstance(values.get("encoder"), dict)
    if "tokenizer_config.json" not in found:
        settings = {"tokenizer_class": "T5Tokenizer" if t5 else "LlamaTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if t5 and "spiece.model" not in found:
        (folder / "tokenizer.model").rename(folder / "spiece.model")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def section_for(folder: Path | None, uuid: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """The `tokenizer` section for a tokenizer's folder, and the members that it names."""
    members = {
        f"{uuid}_{name}": folder / name
        for name in TOKENIZER_FILES
        if folder is not None and (folder / name).is_file()
    }
    named = {name: f"{ARTIFACT}{uuid}_{name}" for name in TOKENIZER_FILES}
    have = {member.partition("_")[2] for member in members}
    model = next((name for name in ("tokenizer.model", "spiece.model") if name in have), None)
    section: dict[str, Any] = {"library": "huggingface", "type": None, "model": None}
    section |= {"vocab_file": None, "merge_file": None}
    if model is not None:
        section |= {"library": "sentencepiece", "model": named[model]}
    elif {"vocab.json", "merges.txt"} <= have:
        section |= {"library": "megatron", "type": "GPT2BPETokenizer"}
        section |= {"vocab_file": named["vocab.json"], "merge_file": named["merges.txt"]}
    section["files"] = [named[name] for name in TOKENIZER_FILES if name in have]
    return section, members
