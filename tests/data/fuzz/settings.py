"""Targets: settings as files and on the command line, and tables of labels."""

from pathlib import Path

import numpy as np

from fuzz.mutations import mutate_text
from fuzz.target import Target, expect, judged
from pera_fast.config import Config, from_yaml, load_config, to_yaml
from pera_fast.config.keys import KEYS
from pera_fast.config.listing import listing
from pera_fast.features.samples import read_samples


def checked(cfg: Config) -> None:
    """A configuration that was accepted can be written, read again and listed."""
    again = from_yaml(to_yaml(cfg))
    expect(again == cfg, "reads otherwise than it was written")
    expect("\0" not in listing(cfg), "lists a NUL")


class Recipes(Target):
    name = "recipes"
    covers = "YAML files as --recipe, config.yaml and asked.yaml"

    def __init__(self, folder):
        super().__init__(folder)
        from pera_fast.config import load

        self._texts = [to_yaml(load_config(name)) for name in ("tiny", "vit_b16")]
        self._texts += [path.read_text() for path in sorted(load._RECIPES.glob("*.yaml"))]
        self._texts.append("recipe: tiny\ntrain:\n  steps: 60\n  batch_size: 8\ndata:\n  bands: [4, 3, red]\n")

    def run(self, rng):
        data = mutate_text(self._texts[int(rng.integers(len(self._texts)))], rng)
        path = self.case / "my.yaml"
        path.write_bytes(data)

        def load() -> str:
            checked(load_config(path))
            return "accepted"

        def stored() -> str:
            checked(from_yaml(data.decode("utf-8", "replace")))
            return "accepted"

        return f"{judged(load)} {judged(stored)}"


class Overrides(Target):
    name = "overrides"
    covers = "section.key=value on the command line: keys and values"

    def __init__(self, folder):
        super().__init__(folder)
        from pera_fast.config.keys import flatten, show

        flat = flatten(load_config("tiny"))
        self._texts = [f"{key}={show(flat[key])}" for key in KEYS]

    def run(self, rng):
        count = int(rng.integers(1, 4))
        given = [
            self._mutated(self._texts[int(number)], rng) if not place else self._texts[int(number)]
            for place, number in enumerate(rng.integers(len(self._texts), size=count))
        ]
        (self.case / "arguments").write_bytes("\0".join(given).encode("utf-8", "surrogateescape"))

        def load() -> str:
            checked(load_config("tiny", given))
            return "accepted"

        return judged(load)

    @staticmethod
    def _mutated(text: str, rng: np.random.Generator) -> str:
        return mutate_text(text, rng).decode("utf-8", "surrogateescape").replace("\0", "")


class Labels(Target):
    name = "labels"
    covers = "CSV files of labelled images"
    _TEXT = "file,class,split\n" + "".join(f"{kind}/{n}.jpg,{kind},train\n" for kind in ("a", "b é") for n in range(4))

    def run(self, rng):
        path: Path = self.case / "labels.csv"
        path.write_bytes(mutate_text(self._TEXT, rng))
        for line in self._TEXT.splitlines()[1:]:
            file = self.case / line.split(",")[0]
            file.parent.mkdir(exist_ok=True)
            file.touch()

        def load() -> str:
            found = read_samples("scene", path)
            expect(len(found.images) == len(found.labels) == len(found.splits) > 0, "files without labels")
            every = [label for labels in found.labels for label in labels]
            expect(all(0 <= label < len(found.classes) for label in every), "a label without a class")
            expect(all(found.labels), "a file without a label")
            return "read"

        return judged(load)
