"""Names of adapters on the Hub, and the older forms `task/dataset@organisation` and `@ukp/name`.

What AdapterHub's own repository held under the older forms lies on the Hub, in the organisation
AdapterHub, as `<model>_<task>_<dataset>_<architecture>` (some as `<model>-<dataset>_...`). The form
`@organisation/name` says that name whole.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graftwerk.checkpoints import hub
from graftwerk.errors import UserError

OLDER = re.compile(r"(?P<task>[\w.-]+)/(?P<dataset>[\w.-]+)@(?P<organisation>[\w.-]+)")
ENTRY = re.compile(r"@[\w.-]+/(?P<name>[A-Za-z0-9][\w.-]*)")
SHORT = re.compile(r"[A-Za-z0-9][\w.-]*")  # a model of the Hub's early days: no organisation
ORGANISATION = "AdapterHub"
SOURCES = ("ah", "hf")  # AdapterHub's own repository, and the Hub
# Of what an adapter's repository may hold.
WANTED = ("*.json", "*.bin", "*.safetensors")
ARCHITECTURES = {
    "seq_bn": "pfeiffer",
    "double_seq_bn": "houlsby",
    "seq_bn_inv": "pfeiffer",
    "double_seq_bn_inv": "houlsby",
    "pfeiffer+inv": "pfeiffer",
    "houlsby+inv": "houlsby",
}


@dataclass(frozen=True)
class Found:
    """A folder with an adapter, and the name that an older form gives it."""

    folder: Path
    name: str | None = None


def find_adapter(
    name_or_path: str | Path,
    model_name: str | None,
    config: str | None = None,
    revision: str | None = None,
    source: str | None = None,
) -> Found:
    """The folder of an adapter: a folder, a file in one, a name of the Hub, or an older form.

    Args:
        model_name: of the base, which `task/dataset@organisation` hangs on.
        config: the name of the architecture, which the same hangs on; None: pfeiffer.
        source: of what is no path here: `hf` takes names of the Hub alone, `ah` the older forms
            alone; None: both.

    Raises:
        UserError: where it is nowhere; says where it was looked for. For another `source`.
    """
    if source is not None and source not in SOURCES:
        raise UserError(f"source={source!r}: 'ah', 'hf', or None for both")
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    if path.exists():
        return Found(path if path.is_dir() else path.parent)
    older, entry = OLDER.fullmatch(name), ENTRY.fullmatch(name)
    if source == "hf" and (older or entry):
        raise UserError(f"{name} is no name of the Hub: leave out source='hf', or set source='ah'")
    if older:
        wanted = older_names(older, model_name, config)
        return Found(_first(name, wanted, revision), older["dataset"])
    if entry:
        return Found(_first(name, [f"{ORGANISATION}/{entry['name']}"], revision))
    if source == "ah":
        raise UserError(
            f"{name}: source='ah' takes sentiment/sst-2@ukp or @ukp/name: leave it out, or set "
            f"source='hf', for a name of the Hub"
        )
    if hub.is_hub_name(name):
        return Found(hub.snapshot(name, revision, list(WANTED)))
    raise UserError(
        f"{name}: no such folder or file; a name of the Hub is organisation/repository, such as "
        f"AdapterHub/bert-base-uncased-pf-sst2"
    )


def older_names(older: re.Match[str], model_name: str | None, config: str | None) -> list[str]:
    """The Hub's names that the older form may stand for, the likeliest first."""
    if not model_name:
        raise UserError(
            f"{older.group()} is one adapter for each base: say model_name, the Hub's name of it"
        )
    short = model_name.rstrip("/").rpartition("/")[2]
    model = model_name.replace("/", "-") if hub.is_hub_name(model_name) else short
    kind = ARCHITECTURES.get(config or "pfeiffer", config or "pfeiffer")
    task, dataset = older["task"], older["dataset"]
    names = [f"{base}_{task}_{dataset}_{kind}" for base in (model, short)]
    names += [f"{base}-{dataset}_{kind}" for base in (model, short)]
    return [f"{ORGANISATION}/{name}" for name in dict.fromkeys(names)]


def _first(name: str, wanted: Sequence[str], revision: str | None) -> Path:
    said = ""
    for repository in wanted:
        try:
            return hub.snapshot(repository, revision, list(WANTED))
        except UserError as error:
            said = said or str(error)
    places = ", ".join(f"https://huggingface.co/{repository}" for repository in wanted)
    raise UserError(f"{name} was looked for at {places}: {said}")


def find_model(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder or file of a base; a name may lack an organisation (`bert-base-uncased`).

    Raises:
        UserError: where it is nowhere.
    """
    name = str(name_or_path)
    if Path(name).expanduser().exists() or not SHORT.fullmatch(name) or name.endswith(".nemo"):
        return hub.resolve(name_or_path, revision)
    return hub.folder_of(name, revision)
