"""All targets of fuzzing, by name."""

from fuzz.data_files import Journals, Manifests, ShardIndexes, Tars, ToolStates
from fuzz.images import Images, Members
from fuzz.run_files import Checkpoints, Contents, RunFolders
from fuzz.settings import Labels, Overrides, Recipes
from fuzz.target import Target
from fuzz.weights import Exports, Published

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (
        Images, Members, Tars, ShardIndexes, Manifests, Journals, ToolStates, Checkpoints, Contents, RunFolders,
        Published, Exports, Recipes, Overrides, Labels,
    )
}  # fmt: skip
