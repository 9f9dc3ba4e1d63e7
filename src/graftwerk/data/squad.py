"""SQuAD: the two official files, or any file in their JSON format, v1.1 and v2.0."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwerk.data.download import RemoteFile, fetch
from graftwerk.data.prepared import Plan, Question, Sieve, file_identity
from graftwerk.data.splits import assign_splits, split_sizes
from graftwerk.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

ADDRESS = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
OFFICIAL = (
    RemoteFile(
        ADDRESS + "train-v1.1.json",
        30_288_272,
        "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
    ),
    RemoteFile(
        ADDRESS + "dev-v1.1.json",
        4_854_279,
        "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
    ),
)
# Nothing else is hidden in the official dev file: as in the published launcher it serves as val
# (first answer) and as test (all answers).
DEV_SPLITS = ("val", "test")

Found = tuple[dict[str, Any], Any, Any]  # fields, answers, id


def plan(
    cfg: "DictConfig",
    official: Sequence[RemoteFile] = OFFICIAL,
    say: Callable[[str], None] = print,
) -> Plan:
    """What to prepare under a `data_prep` config of kind `squad`.

    `official` are the train and dev files that are downloaded to `output_dir` where
    `data_prep.source` is null; only when rows are asked for.
    """
    output_dir = Path(cfg.output_dir)
    reader = _Reader(cfg.prefix, cfg.get("unanswerable_answer"))
    inputs = {
        "kind": "squad",
        "prefix": cfg.prefix,
        "unanswerable_answer": cfg.get("unanswerable_answer"),
    }
    if cfg.get("source") is None:
        _refuse_split(cfg, "the official files")
        advice = (
            f"without a network put {' and '.join(remote.name for remote in official)} into "
            f"{output_dir}, or set data_prep.source to a SQuAD JSON file or a folder of them"
        )

        def downloaded(sieve: Sieve) -> Iterator[Question]:
            train, dev = [fetch(remote, output_dir, advice, say) for remote in official]
            return reader.train_and_dev(train, dev, sieve)

        return Plan(cfg.prefix, inputs | {"source": [r.sha256 for r in official]}, downloaded)

    files = source_files(Path(cfg.source))
    inputs["source"] = [file_identity(path) for path in files]
    if len(files) == 2:
        _refuse_split(cfg, cfg.source)
        train, dev = files
        return Plan(cfg.prefix, inputs, lambda sieve: reader.train_and_dev(train, dev, sieve))
    split = dict(cfg.split) if cfg.get("split") is not None else None
    return Plan(
        cfg.prefix,
        inputs | {"split": split, "seed": cfg.seed},
        lambda sieve: reader.by_paragraph(files[0], split, cfg.seed, sieve),
        may_be_empty=split is not None and not split.get("train"),
    )


def _refuse_split(cfg: "DictConfig", source: str) -> None:
    if cfg.get("split") is not None:
        raise UserError(
            f"data_prep.split is for a source in one file; {source} comes as train and dev: "
            f"set data_prep.split: null, or data_prep.source to one of the files"
        )


def source_files(source: Path) -> list[Path]:
    """[file] or [train file, dev file] for `data_prep.source`."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(
            f"data_prep.source: {source} does not exist; give a SQuAD JSON file, a folder with "
            f"train*.json and dev*.json, or null to download the official files"
        )
    train, dev = sorted(source.glob("train*.json")), sorted(source.glob("dev*.json"))
    if len(train) == len(dev) == 1:
        return train + dev
    found = sorted(source.glob("*.json"))
    if len(found) == 1:
        return found
    names = ", ".join(path.name for path in found) or "no JSON file"
    raise UserError(
        f"data_prep.source: {source} must hold one train*.json and one dev*.json, or one JSON "
        f"file; it holds {names}; name the file itself"
    )


class _Reader:
    """Questions of SQuAD documents, in the words of the configuration."""

    def __init__(self, prefix: str, unanswerable_answer: str | None) -> None:
        self.prefix = prefix
        self.unanswerable_answer = unanswerable_answer

    def train_and_dev(self, train: Path, dev: Path, sieve: Sieve) -> Iterator[Question]:
        # The dev file first, so that a question in both is left out of training, not of the test.
        for path, splits in ((dev, DEV_SPLITS), (train, ("train",))):
            for number, (fields, answers, given) in enumerate(self._sound(path, splits[-1], sieve)):
                name = sieve.own_id(given, f"{self.prefix}-{number}") if splits[0] == "val" else ""
                yield Question(splits, fields, answers, name)

    def by_paragraph(
        self, path: Path, split: dict[str, int | float] | None, seed: int, sieve: Sieve
    ) -> Iterator[Question]:
        """The questions of one file; all on the same paragraph go to the same split."""
        sound = list(self._sound(path, path.name, sieve))
        contexts = list(dict.fromkeys(fields["context"] for fields, _, _ in sound))
        sizes = split_sizes(split, len(contexts), "paragraphs")
        where = dict(zip(contexts, assign_splits(sizes, len(contexts), seed), strict=True))
        for number, (fields, answers, given) in enumerate(sound):
            name = where[fields["context"]]
            if name is None:
                sieve.withdraw("in no split")
                continue
            own_id = sieve.own_id(given, f"{self.prefix}-{number}") if name == "test" else ""
            yield Question((name,), fields, answers, own_id)

    def _sound(self, path: Path, split: str, sieve: Sieve) -> Iterator[Found]:
        for context, question in _questions(path):
            impossible = question.get("is_impossible") is True
            if impossible and self.unanswerable_answer is None:
                sieve.drop("unanswerable")
                continue
            answers = [self.unanswerable_answer] if impossible else _answers(question)
            fields = {"context": context, "question": question.get("question")}
            if sieve.passes(split, fields, answers):
                yield fields, answers, question.get("id")


def _answers(question: dict[str, Any]) -> Any:
    """The texts of every gold answer; what is no list comes as it is, for the sieve to drop."""
    given = question.get("answers")
    if not isinstance(given, list):
        return given
    return [answer.get("text") if isinstance(answer, dict) else answer for answer in given]


def _questions(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(context, question) pairs of a SQuAD JSON file, articles in the order of the file."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    for i, article in enumerate(_list(document, "data", path, "the file")):
        for j, paragraph in enumerate(_list(article, "paragraphs", path, f"data[{i}]")):
            place = f"data[{i}].paragraphs[{j}]"
            for question in _list(paragraph, "qas", path, place):
                if not isinstance(question, dict):
                    raise UserError(f"{path}: {place}.qas holds something that is no object")
                yield paragraph.get("context"), question


def _list(parent: Any, key: str, path: Path, place: str) -> list[Any]:
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, list):
        raise UserError(
            f"{path}: {place} has no list {key!r}; data_prep.source takes SQuAD JSON: "
            f'{{"data": [{{"paragraphs": [{{"context": ..., "qas": [...]}}]}}]}}'
        )
    return value
