"""Heads, parameter groups, losses and scores of fine-tuning."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from finetune_support import small_config

from pera_fast.config import Config
from pera_fast.config.finetune import load_finetune
from pera_fast.features.dense import features
from pera_fast.features.masks import IGNORED
from pera_fast.finetune.heads import change_features
from pera_fast.finetune.losses import mask_loss, predicted, scene_loss
from pera_fast.finetune.model import FineTuner, HeadPlan, parameter_groups, plan_head
from pera_fast.finetune.scores import Counts, scores
from pera_fast.train.inputs import kept_sequences
from pera_fast.weights.backbone import new_transformer

METRICS = pytest.importorskip("sklearn.metrics")


def _config(task: str, more: Sequence[str] = ()) -> Config:
    return load_finetune(small_config(), task, "finetune", ["train.precision=fp32", "finetune.width=8", *more])


def _model(task: str, more: Sequence[str] = (), classes: int = 3) -> FineTuner:
    torch.manual_seed(0)
    cfg = _config(task, more)
    return FineTuner(new_transformer(cfg), plan_head(cfg, tuple("abcdef"[:classes])), cfg)


def _pixels(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("pooling", ["cls", "mean", "both"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_scene_heads(head: str, pooling: str) -> None:
    model = _model("scene", [f"finetune.head={head}", f"finetune.pooling={pooling}"])
    assert model(_pixels(2, 1, 16, 16, 3)).shape == (2, 3)


@pytest.mark.parametrize("head", ["fpn", "uper"])
@pytest.mark.parametrize(("task", "more"), [("segmentation", []), ("change", []), ("change", ["all"])])
def test_dense_heads_at_another_size(task: str, more: list[str], head: str) -> None:
    settings = [f"finetune.head={head}", "finetune.size=24", *(f"finetune.change_features={word}" for word in more)]
    model = _model(task, settings)
    logits = model(_pixels(2, model.plan.views, 24, 24, 3))
    assert logits.shape == (2, 3, 24, 24)
    (logits.square().mean()).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused


def test_features_of_a_change() -> None:
    before, after = torch.tensor([[1.0, 5.0]]), torch.tensor([[4.0, 3.0]])
    assert change_features(before, after, "difference").tolist() == [[3, 2]]
    assert change_features(before, after, "all").tolist() == [[1, 5, 4, 3, 3, 2]]


def test_features_are_those_of_the_frozen_backbone() -> None:
    model, images = _model("scene"), _pixels(3, 1, 16, 16, 3)
    cls, patches = features(model.backbone, images[:, 0], model.mean, model.std)
    expected = model.head(cls.clone(), patches.clone())
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_drop_path_keeps_the_mean_and_drops_what_it_says() -> None:
    model, images = _model("scene"), _pixels(4, 1, 16, 16, 3)
    everything = torch.arange(4, dtype=torch.int32).expand(2, 2, 4).contiguous()
    torch.testing.assert_close(model(images, everything), model(images), rtol=1e-5, atol=1e-6)
    cfg = _config("scene", ["model.drop_path=0.5"])
    drawn = kept_sequences(cfg, [4], 0, 0)
    assert drawn is not None
    assert drawn.shape == (2, 2, 2)
    assert not torch.allclose(model(images, torch.from_numpy(drawn)), model(images))


def test_learning_rates_fall_towards_the_input() -> None:
    model = _model("scene")
    groups = parameter_groups(model, 0.5, 3.0)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    told = {names[id(p)]: (g["lr_scale"], g["decay_scale"]) for g in groups for p in g["params"]}
    assert told["backbone.pos_embed"] == told["backbone.cls_token"] == (0.125, 0.0)
    assert told["backbone.patch_embed.proj.weight"] == (0.125, 1.0)
    assert told["backbone.blocks.0.attn.qkv.weight"] == (0.25, 1.0)
    assert told["backbone.blocks.1.mlp.fc1.bias"] == (0.5, 0.0)
    assert told["backbone.norm.weight"] == (1.0, 0.0)
    assert told["head.out.weight"] == (3.0, 1.0)


def test_a_plan_survives_json() -> None:
    plan = _model("change").plan
    assert HeadPlan.of(plan.told()) == plan


def test_losses_leave_out_what_is_ignored() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    targets[0, :2] = IGNORED
    kept = targets != IGNORED
    expected = torch.nn.functional.cross_entropy(logits.movedim(1, -1)[kept], targets[kept])
    torch.testing.assert_close(mask_loss(logits, targets), expected)
    other = logits.clone()
    other[0, :, :2] += 5 * torch.randn(3, 2, 4)
    torch.testing.assert_close(mask_loss(other, targets, dice=1.0), mask_loss(logits, targets, dice=1.0))
    assert mask_loss(logits, torch.full_like(targets, IGNORED), dice=1.0) == 0
    sure = 50.0 * torch.nn.functional.one_hot(targets.clamp(min=0), 3).permute(0, 3, 1, 2)
    assert mask_loss(sure, targets, dice=1.0) < 1e-3


def test_several_labels_are_binary_each() -> None:
    logits, targets = torch.tensor([[3.0, -3.0]]), torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(scene_loss(logits, targets), torch.log1p(torch.tensor(-3.0).exp()))
    assert predicted(logits, several=True).tolist() == [[True, False]]
    assert predicted(logits, several=False).tolist() == [0]


def test_scores_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 4, 200), rng.integers(0, 3, 200)
    counts = Counts(5)  # the last class is neither there nor found: means leave it out
    for part in (slice(0, 90), slice(90, 200)):
        counts.add(torch.tensor(found[part]), torch.tensor(truth[part]))
    counts.add(torch.tensor([1, 2]), torch.tensor([IGNORED, IGNORED]))
    told = scores(counts, "segmentation", False)
    assert next(iter(told)) == "miou"
    assert told["miou"] == pytest.approx(METRICS.jaccard_score(truth, found, average="macro"))
    assert told["macro_f1"] == pytest.approx(METRICS.f1_score(truth, found, average="macro"))
    assert told["accuracy"] == pytest.approx((truth == found).mean())
    pair = Counts(2)
    pair.add(torch.tensor(found.clip(max=1)), torch.tensor(truth.clip(max=1)))
    change = scores(pair, "change", False)
    assert change["f1"] == pytest.approx(METRICS.f1_score(truth.clip(max=1), found.clip(max=1)))


def test_scores_of_several_labels_are_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    truth, found = rng.random((40, 3)) < 0.4, rng.random((40, 3)) < 0.5
    counts = Counts(3)
    counts.add_several(torch.tensor(found), torch.tensor(truth))
    told = scores(counts, "scene", True)
    assert told["f1"] == pytest.approx(METRICS.f1_score(truth, found, average="micro"))
    assert told["macro_f1"] == pytest.approx(METRICS.f1_score(truth, found, average="macro"))
