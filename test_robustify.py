"""Tests of robustify.py and eval.py, each against an independent oracle; no downloads, no GPU."""

import colorsys
import copy
import doctest
import errno
import io
import json
import math
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; also for the child processes
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # equality to the bit is a promise of one device

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Categorical, kl_divergence
from torch.overrides import TorchFunctionMode

import eval as ev
import robustify as rb

NARROW = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}  # a timm resnet18 of 0.02 M
RESNET = ["resnet18", "none", 32, {**NARROW, "num_classes": 4}]
VIT = {"patch_size": 16, "depth": 3, "embed_dim": 48, "num_heads": 3}
NEW = ["--pretrained=none", "--image-size=32"]
FLAGS = ["--workers=0", "--device=cpu", "--epochs=1", "--batch-size=8", "--lr=1e-2"]
EVAL = ["--workers=0", "--device=cpu"]
WNIDS = timm.data.ImageNetInfo("imagenet-1k").label_names()
FISH = WNIDS[:4]
CONCEPTS = [*WNIDS, "ant", "bee", "cow", "n00000000", "images"]

# --- Helpers --------------------------------------------------------------------------------------

def randomise(module, seed=0):
    """Random parameters and batch-norm statistics. A fresh network hides wrong wiring: its norms
    are the identity, its layer scales tiny, and torchvision's ViT has a classifier of zeros."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = 1 + 0.5 * noise if p.ndim < 2 else noise * (len(p) / p.numel()) ** 0.5
    for name, buffer in module.named_buffers():
        if "running" in name:  # mean, var
            buffer.copy_(torch.rand(buffer.shape, generator=generator) - 0.5 + ("var" in name))
    return module.eval()

def images_of(n, size=32):
    """Pixels in [0, 1], each image with its own colour."""
    generator = torch.Generator().manual_seed(0)
    colour = torch.rand(n, 3, 1, 1, generator=generator)
    return 0.7 * colour + 0.3 * torch.rand(n, 3, size, size, generator=generator)

def make_folder(root, classes=("ant", "bee"), part="train", n=8):
    """PART/CLASS/i.png, dark or bright by class, so that there is something to learn."""
    rng = np.random.default_rng(0)
    for name in classes:
        folder = root / part / name
        folder.mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 128, (32, 32, 3)) + 100 * (name == classes[-1])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root

def make_network(seed=0):
    """A narrow ResNet of four blocks."""
    return randomise(rb.load_network(*RESNET), seed)

def make_student(**settings):
    """Two blocks frozen, one shared, one in each head."""
    return rb.assemble(make_network(), rb.Config(fraction=0.35, **settings))

def differ(student, amount=0.3):
    """Make the heads disagree, and the shared part another, as tuning would."""
    generator = torch.Generator().manual_seed(0)
    for p in student.parameters():
        if p.requires_grad:
            p.data += amount * p.data.abs().mean() * torch.randn(p.shape, generator=generator)
    return student

class Overwrites(nn.Module):
    """SiLU as a user's own module, which overwrites its input."""

    def forward(self, x):
        return x.mul_(x.sigmoid())

def own_modules(activation=nn.SiLU):
    """Three modules of a user's own."""
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8))
    shared = nn.Sequential(activation(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    head = nn.Sequential(activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return {"backbone": randomise(backbone), "shared": randomise(shared), "head": randomise(head)}

def states_equal(one, other):
    """Whether two dictionaries of tensors agree to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)

def step_on(student, teacher, batch):
    """One step of training: (pixels, labels, is_clean) as the data give them."""
    def loss_of(pixels, labels, is_clean):
        return rb.student_loss(student, teacher, pixels, labels, is_clean)

    optimizer = rb.make_optimizer(student, student.config)
    pixels, labels, is_clean = batch
    batch = (255 * pixels).byte(), labels, is_clean
    rb.training_step(student.train(), optimizer, loss_of, batch, student.config)

@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", Mock())

@pytest.fixture(scope="session", autouse=True)
def clips(tmp_path_factory):
    """Two tiny CLIPs that open_clip knows by name."""
    folder = tmp_path_factory.mktemp("clips")
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    towers = {"test-vit": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
              "test-rn": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8}}
    for name, tower in towers.items():
        content = {"embed_dim": 32, "vision_cfg": {**tower, "head_width": 32}, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(content))
    open_clip.add_model_config(folder)

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with data/, teacher.pt, student.pt and robust.pt, made by command lines."""
    root = tmp_path_factory.mktemp("trained")
    make_folder(root / "data")
    for name in ("teacher", "student"):
        assert rb.main(make_teacher(root, root / f"{name}.pt")) == 0
    assert rb.main(robustify(root, root / "robust.pt")) == 0
    return root

def make_teacher(trained, out, name="resnet18", model_args=NARROW):
    """Arguments that make a teacher."""
    return ["--make-teacher", name, *NEW, "--model-args", json.dumps(model_args), *FLAGS,
            "--data", str(trained / "data"), "--out", str(out)]

def robustify(trained, out, *flags):
    """Arguments that robustify student.pt."""
    return ["--student", str(trained / "student.pt"), "--teacher", str(trained / "teacher.pt"),
            "--data", str(trained / "data"), *FLAGS, "--out", str(out), *flags]

# --- The split equals the library's whole network -------------------------------------------------

SMALL = {**VIT, "img_size": 32}
TORCHVISION = {"image_size": 32, "patch_size": 16, "num_layers": 3, "num_heads": 2,
               "hidden_dim": 32, "mlp_dim": 64}
FAMILIES = {  # name: (library, name there, size, arguments)
    "CLIP ViT": ("open_clip", "test-vit", 32, {}),
    "CLIP ResNet": ("open_clip", "test-rn", 64, {}),
    "timm ViT": ("timm", "vit_tiny_patch16_224", 32, SMALL),
    "mean of tokens": ("timm", "vit_tiny_patch16_224", 32,
                       {**SMALL, "global_pool": "avg", "class_token": False}),
    "attention pool": ("timm", "vit_base_patch16_siglip_224", 32, SMALL),
    "DINOv2": ("timm", "vit_small_patch14_reg4_dinov2", 28,
               {**VIT, "patch_size": 14, "img_size": 28}),
    "timm ResNet": ("timm", "resnet18", 32, NARROW),
    "EfficientNet": ("timm", "tf_efficientnet_lite0", 64, {}),
    "torchvision ViT": ("torchvision", "vit", 32, TORCHVISION),
    "hidden layer": ("torchvision", "vit", 32, {**TORCHVISION, "representation_size": 24}),
}

def network_of(family):
    """(our Network, the library's network with a classifier), of the same random weights."""
    library, name, size, arguments = FAMILIES[family]
    if library == "open_clip":
        net = open_clip.create_model(name).visual
    elif library == "timm":
        net = timm.create_model(name, num_classes=5, **arguments)
    else:
        net = torchvision.models.VisionTransformer(num_classes=5, **arguments)
    randomise(net)
    network = rb.Network(copy.deepcopy(net), size, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)).eval()
    if network.classifier is not None:
        return network, net
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    network.classifier = rb.CosineClassifier(weight, 5.0, trained=True)  # CLIP's towers have none
    return network, nn.Sequential(net, network.classifier)

@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_split_equals_whole(family):
    """To the bit, where the last block of a CLIP ViT computes all tokens as the library does."""
    network, net = network_of(family)
    x = images_of(4, network.size)
    mean = torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    std = torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    expected = net((x - mean) / std)
    assert expected.shape == (4, 5)
    assert expected.std(0).min() > 1e-3  # the images differ
    assert rb.count_parameters(network) == rb.count_parameters(net)
    student = rb.assemble(network, rb.Config(fraction=0.3))
    for whole in (True, False):
        for module in [*network.modules(), *student.modules()]:
            if isinstance(module, rb.ClassTokenBlock):
                module.whole = whole
        z = student.backbone(x)
        heads = [head(student.shared(z)) for head in student.heads.values()]
        for logits in (network(x), student.original(z), *heads):
            assert torch.allclose(logits, expected, atol=1e-6)
            assert torch.equal(logits, expected) or not whole

def test_class_token_block():
    """The cheap last block of a CLIP ViT equals the library's, forward and backward."""
    block = network_of("CLIP ViT")[0].blocks[-1].block
    assert isinstance(block, rb.ClassTokenBlock)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        results = []
        for whole in (True, False):
            block.to(dtype).whole = whole
            block.zero_grad()
            tokens = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
            y = block(tokens.requires_grad_(True))
            y.square().mean().backward()
            results.append([y, tokens.grad, *[p.grad for p in block.parameters()]])
        for slow, fast in zip(*results):
            assert slow.abs().max() > 0
            assert (slow - fast).norm() <= tolerance * slow.norm()

@pytest.mark.parametrize("family, blocks", [("CLIP ResNet", 5), ("timm ViT", 3)])
def test_cut_is_the_best(family, blocks):
    """Against a brute-force count by parameter name, and against what assemble tunes."""
    network, _ = network_of(family)
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    whole = sum(sizes.values())
    cuts = set()
    for fraction, head_blocks in ((0.05, 1), (0.2, 0), (0.2, 1), (0.2, 2), (0.6, 1)):
        choices = [whole]
        for first in range(blocks - head_blocks + 1):
            frozen = ("stem.", *[f"blocks.{i}." for i in range(first)])
            choices.append(sum(n for name, n in sizes.items() if not name.startswith(frozen)))
        best = min(choices, key=lambda n: abs(n / whole - fraction))
        config = rb.Config(fraction=fraction, head_blocks=head_blocks, recipe="apt")
        student = rb.assemble(network, config)
        assert sum(p.numel() for p in student.parameters() if p.requires_grad) == best
        assert len(student.heads["combined"].body) == head_blocks + 1  # and the pool
        cuts.add(best)
    assert len(cuts) > 1

HEADS_OF = {"three-heads": 3, "combined-head": 1, "single-teacher": 1, "apt": 1}

@pytest.mark.parametrize("recipe", rb.RECIPES)
def test_what_a_recipe_tunes(recipe):
    network = make_network()
    student = make_student(recipe=recipe)
    last = rb.count_parameters(network.blocks[3], network.pool, network.classifier)
    expected = rb.count_parameters(network.blocks[2]) + HEADS_OF.get(recipe, 0) * last
    if recipe == "lp":
        expected = 16 * 4 + 4
    if recipe.startswith("ft"):
        expected = rb.count_parameters(network)
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == expected
    x = images_of(3)
    assert torch.equal(student.original(student.backbone(x)), network(x))

@pytest.mark.parametrize("fraction, remark", [(0.2, False), (0.05, True)])
def test_share_is_printed_as_it_is(fraction, remark, trained, tmp_path, capsys):
    flags = [f"--fraction={fraction}", "--recipe=apt"]
    assert rb.main(robustify(trained, tmp_path / "out.pt", *flags)) == 0
    student = rb.load(tmp_path / "out.pt")
    tuned = rb.count_parameters(student.shared, student.heads)
    share = tuned / (tuned + rb.count_parameters(student.backbone))
    printed = capsys.readouterr().out
    assert f"apt: {share:.1%} of" in printed
    assert "shared nothing" in printed
    assert ("not --fraction" in printed) == remark

# --- Gradients, and what stays frozen -------------------------------------------------------------

IS_CLEAN = {"clean": [1, 1, 1, 1], "augmented": [0, 0, 0, 0], "mixed": [1, 0, 0, 1]}

@pytest.mark.parametrize("kind", IS_CLEAN)
def test_gradients_reach_their_parts(kind):
    student = make_student().train()
    is_clean = torch.tensor(IS_CLEAN[kind]).bool()
    rb.student_loss(student, make_network(1), images_of(4), torch.arange(4), is_clean).backward()
    reached = {"clean": is_clean.any(), "unclean": (~is_clean).any()}
    for name, part in [("shared", student.shared), *student.heads.items()]:
        for p in part.parameters():
            assert p.grad.any() == reached.get(name, True), name
    for part in (student.backbone, student.original):
        assert all(p.grad is None for p in part.parameters())

@pytest.mark.parametrize("recipe, is_random", [
    ("three-heads", False), ("ft-augmented", False), ("ft-augmented", True)])
def test_training_leaves_the_frozen_alone(recipe, is_random):
    """Batch-norm statistics move only where a network begins at random weights."""
    network = make_network()
    network.is_random = is_random
    student = rb.assemble(network, rb.Config(recipe=recipe, lr=1e-2))
    before = copy.deepcopy(student.state_dict())
    step_on(student, make_network(1), (images_of(8), torch.arange(8) % 4, torch.arange(8) < 4))
    for name, value in student.state_dict().items():
        moves = not name.startswith(("backbone.", "original.", "masks"))
        if "running" in name or "num_batches" in name:
            moves = moves and is_random
        assert torch.equal(value, before[name]) != moves, name

def test_decay_spares_biases_norms_and_cosine_rows():
    student = clip_student(trained=True, weight_decay=0.3)
    decays = {}
    for group in rb.make_optimizer(student, student.config).param_groups:
        for p in group["params"]:
            decays[p] = group["weight_decay"]
    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert len(decays) == len(named)
    for name, p in named.items():
        spared = p.ndim == 1 or name.endswith("classifier.weight")
        assert decays[p] == (0 if spared else 0.3), name

# --- The loss -------------------------------------------------------------------------------------

TAUGHT_BY = {"three-heads": ("original", "robust"), "combined-head": ("original", "robust"),
             "single-teacher": ("robust", "robust")}  # clean examples, augmented ones

def slow_loss(student, teacher, pixels, labels, is_clean):
    """Eqs. 3 to 5, one example at a time; L_d is T^2 KL(teacher || student)."""
    T = student.config.temperature
    taught_by = TAUGHT_BY.get(student.config.recipe, ("nobody", "nobody"))
    total = 0.0
    for x, label, clean in zip(pixels, labels, is_clean):
        z = student.backbone(x[None])
        logits_of = {"original": student.original(z)[0], "robust": teacher(x[None])[0]}
        who = taught_by[0 if clean else 1]
        for name in ("clean" if clean else "unclean", "combined"):
            if name in student.heads:
                logits = student.heads[name](student.shared(z))[0]
                total -= Categorical(logits=logits).log_prob(label)
                if who != "nobody":
                    p = Categorical(logits=logits_of[who] / T)
                    q = Categorical(logits=logits / T)
                    total += student.config.distill_weight * T**2 * kl_divergence(p, q)
    return total / len(labels)

@pytest.mark.parametrize("kind", IS_CLEAN)
@pytest.mark.parametrize("recipe", rb.RECIPES)
@torch.no_grad()
def test_student_loss_is_the_slow_loss(recipe, kind):
    student = differ(make_student(recipe=recipe, temperature=3.0, distill_weight=0.7))
    teacher = make_network(1)
    batch = images_of(4), torch.tensor([3, 1, 0, 2]), torch.tensor(IS_CLEAN[kind]).bool()
    found = rb.student_loss(student, teacher, *batch)
    assert torch.allclose(found, slow_loss(student, teacher, *batch), rtol=1e-4)

@pytest.mark.parametrize("jsd", [0.0, 12.0])
@torch.no_grad()
def test_teacher_loss(jsd):
    network = make_network()
    student = rb.assemble(network, rb.Config(recipe="ft-augmented"))
    views = images_of(6).reshape(2, 3, 3, 32, 32)
    labels = torch.tensor([0, 3])
    expected = 0.0
    for example, label in zip(views, labels):
        logits = network(example)
        expected -= Categorical(logits=logits[0]).log_prob(label) / 2
        mixture = Categorical(probs=logits.softmax(-1).mean(0))
        expected += jsd * kl_divergence(Categorical(logits=logits), mixture).mean() / 2
    assert torch.allclose(rb.teacher_loss(student, jsd, views, labels), expected, rtol=1e-4)

@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family):
    """As on a GPU: a float32 loss, finite gradients, no mixed types; and a whole cast predicts."""
    network, _ = network_of(family)
    student = rb.assemble(network, rb.Config(fraction=0.3)).train()
    x = images_of(4, network.size)
    teacher = rb.load_network("resnet18", "none", 32, {**NARROW, "num_classes": 5})
    with torch.autocast("cpu", torch.bfloat16):
        loss = rb.student_loss(student, teacher, x, torch.arange(4), torch.arange(4) < 2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.requires_grad)
    expected = student.eval().predict(x).phi
    found = student.to(torch.bfloat16).predict(x.to(torch.bfloat16)).phi
    for name in rb.HEADS:
        assert torch.allclose(found[name].float(), expected[name], atol=0.1)

# --- Head selection -------------------------------------------------------------------------------

def test_kl_divergence():
    p, q = torch.randn(2, 1000, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    expected = kl_divergence(Categorical(probs=p), Categorical(probs=q))
    assert torch.allclose(rb.kl_divergence(p, q), expected, atol=1e-6)
    near = p * (1 + 1e-6 * q)
    assert rb.kl_divergence(p, near / near.sum(-1, keepdim=True)).min() >= 0
    one = torch.eye(3)[:1]
    assert rb.kl_divergence(one, one) == 0
    assert 80 < rb.kl_divergence(one, one.roll(1, dims=1)) < math.inf

def test_mc_dropout_is_a_loop_over_masks():
    torch.manual_seed(0)
    classifier = nn.Linear(16, 3)
    features = torch.randn(4, 16)
    masks = (torch.rand(7, 16) < 0.8) / 0.8
    phi, uncertainty = rb.mc_dropout(classifier, features, masks)
    for i, f in enumerate(features):
        passes = np.array([classifier(f * mask).softmax(-1).tolist() for mask in masks])
        assert phi[i].tolist() == pytest.approx(passes.mean(0).tolist(), abs=1e-6)
        assert uncertainty[i].item() == pytest.approx(passes.std(0).mean(), abs=1e-6)

def test_mask_variance_has_its_closed_form():
    """Inverted dropout before a linear layer: mean w f, variance p / (1 - p) * sum w^2 f^2."""
    torch.manual_seed(0)
    head = nn.Linear(64, 6)
    f = torch.randn(8, 64)
    masks = rb.dropout_masks(rb.Config(passes=4000, dropout=0.3), 64)
    logits = head(f[:, None] * masks).double()  # (B, K, C)
    closed = 0.3 / 0.7 * (f**2 @ head.weight.T**2).double()
    ratio = logits.var(1, correction=0) / closed
    assert ratio.mean().item() == pytest.approx(1, abs=0.05)
    assert ((logits.mean(1) - head(f)).abs() < 5 * (closed / 4000).sqrt()).all()

# Three images: rules "u" and "kl-u" disagree; a tie; KL(m || k) and KL(k || m) disagree.
PHI_M = torch.tensor([[.5, .5, 0], [.5, .5, 0], [.4, .4, .2]])
PHI_1 = torch.tensor([[.6, .4, 0], [.7, .3, 0], [.8, .1, .1]])
PHI_2 = torch.tensor([[.9, .1, 0], [.7, .3, 0], [.5, .499, .001]])
U_1 = torch.tensor([.3, .2, .1])
U_2 = torch.tensor([.1, .2, .1])

@pytest.mark.parametrize("rule, expected, mirrored", [
    # kl-u: .3 * .02 < .1 * .51; a tie; .1 * .42 < .1 * .88, though KL(k || m) is .35 > .22
    ("kl-u", "ccc", "ucu"), ("kl", "ccc", "ucu"), ("u", "ucc", "ccc"),
    ("confidence", "ucc", "ccu")])
def test_select_head_rules(rule, expected, mirrored):
    phi = {"combined": PHI_M, "clean": PHI_1, "unclean": PHI_2}
    u = {"combined": torch.zeros(3), "clean": U_1, "unclean": U_2}
    found = rb.select_head(phi, u, rule)
    assert "".join(rb.HEADS[i][0] for i in found) == expected
    phi.update(clean=PHI_2, unclean=PHI_1)
    u.update(clean=U_2, unclean=U_1)
    found = rb.select_head(phi, u, rule)
    assert "".join(rb.HEADS[i][0] for i in found) == mirrored  # ties stay clean

@pytest.mark.parametrize("rule", ["kl-u", "u", "kl", "confidence"])
@torch.no_grad()
def test_predict_returns_the_chosen_head(rule):
    torch.manual_seed(0)
    head = nn.Linear(16, 4)
    x = torch.randn(64, 16)
    config = rb.Config(rule=rule, dropout=0.4)
    student = differ(rb.RobustStudent(nn.Identity(), nn.Sequential(), head, config), 1.0)
    state = torch.get_rng_state()
    found = student.predict(x)
    assert torch.equal(torch.get_rng_state(), state)  # it does not disturb others' numbers
    uncertainty = {}
    for name, head in student.heads.items():
        phi, uncertainty[name] = rb.mc_dropout(head.classifier, x, student.masks)
        assert torch.equal(phi, found.phi[name])
    assert torch.equal(found.head, rb.select_head(found.phi, uncertainty, rule))
    assert len(set(found.head.tolist())) == 2  # each head is chosen by some image
    for i, index in enumerate(found.head):
        name = rb.HEADS[index]
        assert torch.equal(found.probabilities[i], found.phi[name][i])
        assert torch.equal(found.uncertainty[i], uncertainty[name][i])
    torch.manual_seed(2)
    assert torch.equal(student(x), found.probabilities)
    alone = torch.cat([student(row[None]) for row in x])
    assert torch.allclose(alone, found.probabilities, atol=1e-6)  # whatever the batch

@pytest.mark.parametrize("activation", [lambda: nn.SiLU(inplace=True), Overwrites])
def test_in_place_activations_do_no_harm(activation):
    expected = rb.RobustStudent(**own_modules())
    student = rb.RobustStudent(**own_modules(activation))
    z = student.backbone(images_of(4))
    found = student.predict_from(z).phi
    for name, phi in expected.predict(images_of(4)).phi.items():
        assert torch.allclose(found[name], phi, atol=1e-6)
    original = expected.original_probabilities(expected.backbone(images_of(4)))
    assert torch.allclose(student.original_probabilities(z), original, atol=1e-6)

def test_docstring_example_runs():
    found = doctest.testmod(rb)
    assert found.attempted > 5
    assert found.failed == 0

@torch.no_grad()
def test_interpolation_with_the_original(tmp_path):
    """WiSE-FT."""
    path = tmp_path / "robust.pt"
    student = differ(rb.RobustStudent(**own_modules(), config=rb.Config(dropout=0.0)))
    rb.save(student, path)
    x = images_of(4)
    original = student.original_probabilities(student.backbone(x))
    assert not torch.allclose(student.predict(x).phi["clean"], original, atol=1e-3)
    start = rb.load(path, **own_modules(), alpha=0)
    assert torch.allclose(start.predict(x).phi["clean"], original, atol=1e-6)
    assert torch.equal(rb.interpolated(student, 1.0)(x), student(x))
    half = rb.load(path, **own_modules(), alpha=0.5)
    for name in rb.HEADS:
        start = student.original.parameters()
        end = [*student.shared.parameters(), *student.heads[name].parameters()]
        found = [*half.shared.parameters(), *half.heads[name].parameters()]
        for a, b, c in zip(start, end, found, strict=True):
            assert torch.allclose(c, (a + b) / 2, atol=1e-6)
    assert torch.equal(half.original_probabilities(half.backbone(x)), original)

# --- CLIP: zero-shot and visually encoded ---------------------------------------------------------

def plain_clip():
    """The CLIP whose weights load_network draws from its seed."""
    torch.manual_seed(0)
    return open_clip.create_model("test-vit").eval()

@torch.no_grad()
def embed(names):
    """Embeddings of classes by hand, one at a time, as Sec. 4.4 says."""
    clip = plain_clip()
    tokenize = open_clip.get_tokenizer("test-vit")
    rows = []
    for name in names:
        texts = [template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        encoded = clip.encode_text(tokenize(texts))
        rows.append(F.normalize(F.normalize(encoded, dim=-1).mean(0), dim=-1))
    return torch.stack(rows)

def clip_network(trained):
    network = rb.load_network("test-vit", "none")
    network.class_names = ["ant", "bee", "cat"]
    network.classifier = rb.CosineClassifier(*network.text_embeddings(network.class_names), trained)
    return network

def clip_student(trained, **settings):
    return rb.assemble(clip_network(trained), rb.Config(zero_shot=not trained, **settings))

@torch.no_grad()
def test_clip_logits_by_hand():
    clip = plain_clip()
    x = images_of(4)
    mean = torch.tensor(clip.visual.preprocess_cfg["mean"])[:, None, None]
    std = torch.tensor(clip.visual.preprocess_cfg["std"])[:, None, None]
    encoded = F.normalize(clip.encode_image((x - mean) / std), dim=-1)
    expected = clip.logit_scale.exp() * encoded @ embed(["ant", "bee", "cat"]).T
    assert expected.std(0).min() > 1e-3
    student = clip_student(trained=False)
    z = student.backbone(x)
    for logits in (student.original(z), student.heads["clean"](student.shared(z))):
        assert torch.allclose(logits, expected, atol=1e-4)
    # ImageNet's folder names stand for its class names, underscores for blanks.
    found, _ = student.text_embeddings(["n01440764", "great_auk"])
    assert torch.allclose(found, embed(["tench", "great auk"]), atol=1e-5)

@pytest.mark.parametrize("trained", [False, True])
def test_training_tunes_a_clip_classifier_in_ve_alone(trained):
    student = clip_student(trained, lr=1e-2)
    before = copy.deepcopy(student.heads["combined"].state_dict())
    step_on(student, clip_network(True), (images_of(3), torch.arange(3), torch.arange(3) < 2))
    after = student.heads["combined"].state_dict()
    for name in after:
        moves = "scale" not in name and (trained or "classifier" not in name)
        assert torch.equal(after[name], before[name]) != moves, name
    lengths = after["classifier.weight"].norm(dim=-1)
    assert torch.allclose(lengths, torch.ones(3), atol=1e-6)

def test_probe_keeps_unit_rows_and_accuracy():
    """Decay of rows whose length is divided out would shrink them to nothing."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(5, 32, generator=generator), dim=-1)
    labels = torch.arange(400) % 5
    features = 3 * centres[labels] + 0.7 * torch.randn(400, 32, generator=generator)
    start = centres + 0.2 * torch.randn(5, 32, generator=generator)
    classifier = rb.CosineClassifier(start, 100.0, trained=True)
    before = (classifier(features).argmax(-1) == labels).sum()
    rb.linear_probe(features, labels, classifier)
    assert (classifier(features).argmax(-1) == labels).sum() > before
    assert torch.allclose(classifier.weight.norm(dim=-1), torch.ones(5), atol=1e-5)

def test_clip_takes_new_classes(tmp_path):
    """A zero-shot plug-in does, is saved and loaded with them; a trained classifier refuses."""
    names = ["dog", "bee", "elk", "fox", "gnu"]
    x = images_of(4)
    student = differ(clip_student(trained=False), 0.1)
    rb.save(student, tmp_path / "zs.pt")
    loaded = rb.load(tmp_path / "zs.pt", class_names=names)
    for head in student.heads.values():  # the tuned heads, their words swapped by hand
        scale = head.classifier.scale
        head.classifier = rb.CosineClassifier(embed(names), scale, trained=False)
    assert torch.allclose(loaded(x), student(x), atol=1e-5)
    rb.save(loaded, tmp_path / "new.pt")
    again = rb.load(tmp_path / "new.pt")
    assert again.class_names == names
    assert torch.equal(again(x), loaded(x))
    rb.save(clip_student(trained=True), tmp_path / "ve.pt")
    with pytest.raises(rb.Refusal, match="zero-shot"):
        rb.load(tmp_path / "ve.pt", class_names=names)

@torch.no_grad()
def test_quick_gelu_follows_the_tag(monkeypatch):
    """OpenAI's weights need QuickGELU, though the plain name of the architecture says GELU."""
    assert open_clip.get_pretrained_cfg("ViT-L-14", "openai")["quick_gelu"]
    create = open_clip.create_model

    def create_without_weights(name, pretrained, **arguments):
        return create(name, **arguments)

    default = rb.load_network("test-vit", "none").features(images_of(2))
    monkeypatch.setattr(open_clip, "create_model", create_without_weights)
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", Mock(return_value=["tag"]))
    for quick in (True, False):
        config = {"quick_gelu": quick}
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", Mock(return_value=config))
        found = rb.load_network("test-vit", "tag").features(images_of(2))
        assert torch.equal(found, default) != quick

@pytest.mark.parametrize("known, names, is_kept", [
    (list("abcd"), list("abcd"), True), (list("abcd"), list("abce"), False),
    (list("abcd"), list("badc"), False), (None, list("abcd"), False),
    (WNIDS, WNIDS, True), (WNIDS, WNIDS[::-1], False)])
def test_classifier_is_kept_for_its_own_classes_alone(known, names, is_kept, monkeypatch, tmp_path):
    network = make_network()
    network.class_names = known
    network.is_random = False
    if known is WNIDS:  # as a file of plain weights with a thousand outputs has
        torch.save(timm.create_model("resnet18", **NARROW).state_dict(), tmp_path / "plain.pth")
        network = rb.load_network(f"resnet18:{tmp_path}/plain.pth", model_args=NARROW)
    before = network.classifier
    fitted = []
    monkeypatch.setattr(rb, "all_features", Mock(return_value=[]))
    monkeypatch.setattr(rb, "linear_probe", fitted.append)
    rb.give_classifier(network, [], names, rb.Config(device="cpu"))
    assert (network.classifier is before) == is_kept
    assert fitted == ([] if is_kept else [network.classifier])
    assert network.class_names == names
    assert len(network.classifier.weight) == len(names)

# --- On a GPU that is not there -------------------------------------------------------------------

class MasksSelectTwo(TorchFunctionMode):
    """Fake tensors hold no values: a boolean mask selects two rows, and any number is 1."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.item:
            return 1.0
        indexes = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        if indexes and getattr(args[1], "dtype", None) == torch.bool:
            args = (args[0], torch.arange(2, device=args[1].device), *args[2:])
        return func(*args, **(kwargs or {}))

def copy_fake(tensor, memo=None, device=None):
    """Deep copy of a fake tensor, which has no storage that torch's own could copy."""
    twin = tensor.detach().clone().to(device or tensor.device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, tensor.requires_grad)
    return twin

def move_fakes(module, device):
    """nn.Module.to: torch's own cannot swap fake parameters."""
    for part in module.modules():
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in tensors:
            setattr(part, name, copy_fake(tensor, device=device))
    return module

@pytest.mark.parametrize("case", ["three heads", "teacher on the CPU", "make-teacher", "zero-shot"])
def test_everything_is_on_the_gpu(case, monkeypatch):
    """Fake tensors compute devices alone, and raise where two are mixed."""
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", copy_fake)
    monkeypatch.setattr(nn.Module, "to", move_fakes)
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES[:2]
    with FakeTensorMode(), MasksSelectTwo():
        arguments = ["resnet18", "none", 32, {**NARROW, "num_classes": 2}]
        network = rb.load_network(*arguments)
        teacher = rb.load_network(*arguments)
        config = rb.Config(zero_shot=case == "zero-shot")
        if case == "make-teacher":
            config.recipe = "ft-augmented"
        if case == "zero-shot":
            network = rb.load_network("test-vit", "none")
            weight, scale = network.text_embeddings(["ant", "bee"], templates, device="cuda")
            network.classifier = rb.CosineClassifier(weight, scale, trained=False)
        student = rb.assemble(network, config).to("cuda").train()
        if case != "teacher on the CPU":
            teacher.to("cuda")
        pixels = torch.rand(4, 3, 32, 32, device="cuda")
        labels = torch.zeros(4, dtype=torch.long, device="cuda")
        if case == "teacher on the CPU":
            with pytest.raises(RuntimeError, match="device"):
                rb.student_loss(student, teacher, pixels, labels, labels == 0)
            return
        if case == "make-teacher":
            loss = rb.teacher_loss(student, 12.0, torch.stack([pixels] * 3, dim=1), labels)
        else:
            loss = rb.student_loss(student, teacher, pixels, labels, labels == 0)
        if case == "zero-shot":
            names = ["dog", "elk", "fox"]
            found = student.text_embeddings(names, templates, device="cuda")
            rb.set_classes(student, names, *found)
        found = student.eval().predict(pixels)
        original = student.original_probabilities(student.backbone(pixels))
        half = rb.interpolated(student, 0.5)(pixels)
        for tensor in (loss, original, half, found.probabilities, found.head, found.uncertainty):
            assert tensor.device.type == "cuda"

# --- Views ----------------------------------------------------------------------------------------

@pytest.fixture
def samples(tmp_path):
    """Twelve images whose label is their index."""
    paths = sorted(make_folder(tmp_path / "views", n=6).glob("train/*/*.png"))
    return [(str(path), i) for i, path in enumerate(paths)]

def views_of(samples, **settings):
    return rb.TrainingViews(samples, 32, "augmix+deepaugment", rb.Config(**settings))

def test_views_depend_on_seed_epoch_and_index_alone(samples):
    views = views_of(samples, seed=3)
    keys = [(epoch, index) for epoch in (0, 1) for index in range(12)]
    found = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        batches = rb.batches(views, iter(keys), 5, workers)
        found.append([torch.cat(column) for column in zip(*batches)])
    for one, other in zip(*found):
        assert torch.equal(one, other)
    pixels, labels, _ = found[0]
    assert labels.tolist() == [*range(12), *range(12)]
    for place in reversed(range(24)):  # one by one, in another order
        assert torch.equal(views[keys[place]][0], pixels[place])
    others = views_of(samples, seed=4)
    for another in (pixels[12:], [others[key][0] for key in keys[:12]]):
        assert sum(torch.equal(a, b) for a, b in zip(another, pixels)) < 6

def test_views_compute_on_one_thread_and_seed_no_one_else(samples, monkeypatch):
    """Not the generator outside, not a GPU, even where an image cannot be read."""
    threads = []

    def noise2net(image):
        threads.append(torch.get_num_threads())
        return image

    monkeypatch.setattr(rb, "noise2net", noise2net)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", pytest.fail)
    views = views_of(samples)
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    Path(samples[0][0]).write_bytes(b"no image")
    with pytest.raises(rb.Refusal, match=samples[0][0]):
        views[0, 0]
    for index in range(1, 12):
        assert len(views[0, index]) == 3
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert set(threads) == {1}
    assert torch.equal(torch.get_rng_state(), state)

def test_coin_is_fair_and_clean_views_are_clean(samples):
    views = views_of(samples)
    plain = rb.TrainingViews(samples, 32, "none", rb.Config())
    clean = 0
    changed = 0
    for key in [(epoch, index) for epoch in range(30) for index in range(12)]:
        pixels, _, is_clean = views[key]
        expected, _, is_called_clean = plain[key]
        assert is_called_clean  # nothing is augmented, nothing is called so
        same = torch.equal(pixels, expected)
        assert same or not is_clean
        clean += is_clean
        changed += not same
    assert 142 <= clean <= 218  # of 360; four standard deviations
    assert changed > 100

def test_triples_and_withheld_operations(samples):
    views = rb.AugMixTriples(samples, 32, "augmix+deepaugment", rb.Config())
    pixels, label, is_clean = views[0, 7]
    assert pixels.shape == (3, 3, 32, 32)
    assert (pixels.dtype, label, is_clean) == (torch.uint8, 7, True)
    assert not torch.equal(pixels[1], pixels[2])
    assert views.augmix.all_ops is False  # or it would train on ImageNet-C's corruptions
    Image.new("RGB", (32, 32), (77, 77, 77)).save(samples[7][0])
    assert set(views[0, 7][0][0].unique().tolist()) <= {0, 77}  # a crop alone, with its padding

def test_noise2net_has_its_published_strength(monkeypatch):
    """RMS change over twenty smooth images: 0.20 published, 0.09 without its last norm."""
    coarse = torch.rand(20, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1)
    torch.manual_seed(0)
    changed = torch.stack([rb.noise2net(image) for image in images])
    assert 0 <= changed.min()
    assert changed.max() <= 1
    strength = (changed - images).square().mean((1, 2, 3)).sqrt()
    assert strength.mean().item() == pytest.approx(0.20, abs=0.03)
    draws = []
    uniform = torch.Tensor.uniform_

    def spy(tensor, *bounds):
        if tensor.ndim == 0:
            draws.append(bounds)
        return uniform(tensor, *bounds)

    monkeypatch.setattr(torch.Tensor, "uniform_", spy)
    rb.noise2net(images[0])
    assert draws == [(0.375, 0.75)]  # one eps for the four blocks of an image

def odd_images(folder):
    """Paths of images in all modes, of level 60 in red; the last is a single pixel."""
    turned = Image.Exif()
    turned[0x0112] = 6
    colour = Image.new("RGB", (50, 40), (60, 61, 62))
    deep = np.full((40, 50), 60 * 256 + 99, np.uint16)
    images = {"grey.png": colour.convert("L"), "palette.png": colour.quantize(4),
              "deep.png": Image.fromarray(deep), "cmyk.jpg": colour.convert("CMYK"),
              "alpha.png": colour.convert("RGBA"), "turned.jpg": colour,
              "pixel.png": colour.crop((0, 0, 1, 1))}
    for name, image in images.items():
        image.save(folder / name, exif=turned)
    return [str(folder / name) for name in images]

def test_images_of_odd_modes_are_read(tmp_path):
    paths = odd_images(tmp_path)
    for path in paths:
        image = rb.read_image(path)
        assert image.shape == ((3, 1, 1) if path == paths[-1] else (3, 40, 50))  # none is turned
        assert abs(image[0].float().mean() - 60) < 3, path
    samples = [(path, 0) for path in paths]
    centre = rb.CentreViews(samples, 224)
    for index in range(len(samples)):
        assert centre[index][0].shape == (3, 224, 224)
        assert views_of(samples)[0, index][0].shape == (3, 32, 32)

@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("length", [0, 300])
def test_broken_images_are_refused_by_name(workers, length, trained, tmp_path, capfd):
    data = make_folder(tmp_path / "data")
    path = data / "train/bee/3.png"
    path.write_bytes(path.read_bytes()[:length])
    flags = ["--data", str(data), f"--workers={workers}", "--recipe=apt"]
    process = forked(robustify(trained, tmp_path / "out.pt", *flags))
    process.join()
    assert process.exitcode == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"robustify.py: {path}")
    assert not list(tmp_path.glob("out*"))

# --- Checkpoints ----------------------------------------------------------------------------------

@pytest.mark.parametrize("own", [False, True])
def test_checkpoint_round_trip(own, tmp_path):
    """Also of settings that are not plain numbers and words."""
    config = rb.Config(rule="u", seed=5, lr=np.float64(0.5), epochs=np.int64(2), data=Path("a/b"))
    student = rb.RobustStudent(**own_modules(), config=config)
    if not own:
        network = rb.load_network(*RESNET, seed=5)  # the random weights come back from the seed
        student = rb.assemble(network, config)
    student.class_names = list("abcd")
    rb.save(differ(student), tmp_path / "robust.pt")
    loaded = rb.load(tmp_path / "robust.pt", **(own_modules() if own else {}))
    assert states_equal(loaded.state_dict(), student.state_dict())
    assert torch.equal(loaded(images_of(4)), student(images_of(4)))
    assert loaded.config == config
    assert loaded.class_names == list("abcd")
    assert not loaded.training

def test_command_lines(trained):
    """M in the plug-in is still the student that was given, the heads no longer are."""
    student = rb.load_network(str(trained / "student.pt"))
    robust = rb.load(trained / "robust.pt")
    original = rb.load_original(trained / "robust.pt")
    assert states_equal(original.state_dict(), student.state_dict())
    assert student.class_names == robust.class_names == ["ant", "bee"]
    x = images_of(4)
    with torch.no_grad():
        expected = student(x).softmax(-1)
    assert torch.equal(robust.original_probabilities(robust.backbone(x)), expected)
    assert (robust.predict(x).phi["clean"] - expected).abs().max() > 1e-4

@pytest.mark.parametrize("part", ["backbone", "head"])
def test_another_network_is_refused(part, tmp_path):
    """A buffer of the backbone counts, and a weight of the original's tail."""
    rb.save(rb.RobustStudent(**own_modules()), tmp_path / "robust.pt")
    changed = own_modules()
    if part == "backbone":
        changed["backbone"][1].running_mean[0] += 1e-3
    else:
        changed["head"][-1].weight.data[0, 0] += 1e-3
    with pytest.raises(rb.Refusal) as refused:
        rb.load(tmp_path / "robust.pt", **changed)
    for modules in (own_modules(), changed):
        student = rb.RobustStudent(**modules)
        assert rb.fingerprint(student.backbone, student.original)[:12] in str(refused.value)

class Evil(str):
    """Unpickling it makes the folder of this name."""

    def __reduce__(self):
        return os.mkdir, (str(self),)

def test_code_in_a_file_does_not_run(tmp_path):
    trap = tmp_path / "trap"
    path = tmp_path / "robust.pt"
    pickle.loads(pickle.dumps(Evil(trap)))
    assert trap.is_dir()  # the attack works
    trap.rmdir()
    for zipped in (True, False):
        torch.save({"tuned": Evil(trap)}, path, _use_new_zipfile_serialization=zipped)
        for load in (rb.load, rb.load_network):
            with pytest.raises(rb.Refusal, match="robust.pt"):
                load(str(path))
        with pytest.raises(rb.Refusal, match="robust.pt"):
            rb.load_network(f"resnet18:{path}")
    assert not trap.exists()

def mutate(trained, kind, keys, value, path):
    """Write a plug-in or a network, its checksum right, in which one thing is another."""
    source = trained / ("robust.pt" if kind == "plug-in" else "teacher.pt")
    part = content = rb.read_checkpoint(source, kind)
    *parents, last = keys.split("/")
    for key in parents:
        part = part[key]
    part[last] = value
    if value is MISSING:
        del part[last]
    rb.write_checkpoint(kind, content, path)

def load_any(kind, path):
    return rb.load(path) if kind == "plug-in" else rb.load_network(str(path))

@pytest.mark.parametrize("kind, part", [("plug-in", "source"), ("network", "architecture")])
@pytest.mark.parametrize("key, value", [
    ("pretrained_image_path", "evil.pt"), ("checkpoint_path", "evil.pt"), ("cache_dir", "."),
    ("pretrained_cfg_overlay", {"url": "http://localhost/evil"}), ("pretrained_hf", True),
    ("pretrained_cfg", {"file": "evil.pt"}), ("weights", "DEFAULT"), ("weights_only", False),
    ("act_layer", "http://localhost/evil"), ("norm_layer", "../evil")])
def test_a_file_loads_no_other(kind, part, key, value, trained, tmp_path, monkeypatch):
    attempt = Mock(side_effect=OSError("no network in tests"))
    monkeypatch.setattr(socket.socket, "connect", attempt)
    monkeypatch.setattr(socket, "getaddrinfo", attempt)
    monkeypatch.chdir(tmp_path)
    torch.save(Evil("trap"), "evil.pt")
    source = {"name": "resnet18", "image_size": 32, "model_args": {**NARROW, key: value}}
    mutate(trained, kind, part, source, "mutated.pt")
    with pytest.raises(rb.Refusal, match=key):
        load_any(kind, "mutated.pt")
    assert not attempt.called
    assert not Path("trap").exists()

MISSING = object()
HEAD = "tuned/heads.clean.classifier.weight"
ZERO_HEADS = {"name": "deit_tiny_patch16_224", "model_args": {"num_heads": 0}}
MUTATIONS = [  # (kind of file, path to what is changed, what it becomes)
    ("plug-in", "tuned", {}), ("plug-in", "tuned/masks", MISSING), ("plug-in", HEAD, MISSING),
    ("plug-in", HEAD, "words"), ("plug-in", HEAD, torch.ones(2, 2)),
    ("plug-in", "tuned/wings", torch.ones(2)), ("plug-in", "config/wings", 2),
    ("plug-in", "config/recipe", "ours"), ("plug-in", "config/recipe", "apt"),
    ("plug-in", "config/rule", "coin"), ("plug-in", "config/epochs", math.inf),
    ("plug-in", "config/lr", math.nan), ("plug-in", "config/passes", 7),
    ("plug-in", "config/model_args", [1]), ("plug-in", "config/fraction", 0.9),
    ("plug-in", "source/name", "other.pt"), ("plug-in", "source/name", 7),
    ("plug-in", "classifier/weight", torch.ones(3)),
    ("network", "state", {}), ("network", "state/classifier.weight", torch.ones(3)),
    ("network", "state/stem.net.conv1.weight", MISSING),
    ("network", "architecture/name", "swin_t"), ("network", "architecture/image_size", "x"),
    ("network", "architecture/model_args/channels", [8, 8, 16, 17]),
    ("network", "architecture/model_args/output_stride", 5),
    ("network", "architecture", ZERO_HEADS)]
for _key in ("tuned", "config", "source", "fingerprint"):
    MUTATIONS += [("plug-in", _key, MISSING), ("plug-in", _key, 7)]
for _key in ("state", "architecture"):
    MUTATIONS += [("network", _key, MISSING), ("network", _key, 7)]

@pytest.mark.parametrize("kind, keys, value", MUTATIONS)
def test_a_mutated_file_is_refused(kind, keys, value, trained, tmp_path):
    mutate(trained, kind, keys, value, tmp_path / "mutated.pt")
    with pytest.raises(rb.Refusal):
        load_any(kind, tmp_path / "mutated.pt")

def test_damaged_bytes_are_refused_or_harmless(trained, tmp_path):
    """Flipped bits, and truncation anywhere."""
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.pt"
    whole = (trained / "robust.pt").read_bytes()
    sparse = io.BytesIO()
    torch.save({"format": "robustify plug-in", "tuned": torch.eye(2).to_sparse()}, sparse)
    contents = [b"", b"hello\n", rng.bytes(5000), sparse.getvalue()]
    for place in rng.integers(0, len(whole), 30):
        contents.append(whole[:place])
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        contents.append(bytes(flipped))
    expected = rb.load(trained / "robust.pt").state_dict()
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            assert states_equal(rb.load(path).state_dict(), expected)
        except rb.Refusal as refusal:
            assert str(path) in str(refusal)
            refused += 1
    assert refused > 40

def test_full_disk_leaves_the_older_file(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.pt"
    out.write_bytes(b"older")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=full))
    assert rb.main(robustify(trained, out, "--recipe=lp")) == 2
    assert "No space" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"older"

# --- Training -------------------------------------------------------------------------------------

def test_nan_is_told_in_one_line_and_not_written(trained, tmp_path, capsys):
    assert rb.main(robustify(trained, tmp_path / "out.pt", "--lr=1e30")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("robustify.py: epoch 1, step 2")
    assert "not written yet" in line
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("broken, last", [("loss", 3), ("weight", 4)])
def test_the_last_good_checkpoint_stays(broken, last, samples, tmp_path):
    """Two steps an epoch; a later one gives a loss that is NaN, or a weight that is infinite."""
    config = rb.Config(out=tmp_path / "out", device="cpu", workers=0, epochs=3, batch_size=6)
    student = make_student()
    steps = []
    written = []

    def loss_of(pixels, labels, is_clean):
        steps.append(len(pixels))
        loss = student.heads["clean"](student.shared(student.backbone(pixels))).mean()
        if len(steps) == last and broken == "loss":
            loss = loss * math.nan
        elif len(steps) == last:
            next(student.heads["unclean"].parameters()).data.fill_(math.inf)
        return loss

    def write():
        written.append(len(steps))
        (tmp_path / "out").touch()

    views = rb.TrainingViews(samples, 32, "none", config)
    with pytest.raises(rb.Refusal, match=f"epoch 2, step {last - 2}.*stays as it was"):
        rb.fit(student, loss_of, views, config, write)
    assert written == [2]

def test_seed_and_rank_reach_dropout(samples, monkeypatch, tmp_path):
    """Each step of each process has its own noise, and the same when it is run again."""
    noise = {}
    drawn = []

    def training_step(*arguments):
        drawn.append(torch.rand(()).item())
        return 0.0

    monkeypatch.setattr(rb, "training_step", training_step)
    monkeypatch.setattr(rb, "batches", lambda *arguments: iter(range(9)))
    for seed, rank in ((0, 0), (1, 0), (0, 1), (0, 0)):
        monkeypatch.setattr(rb, "RANK", rank)
        torch.manual_seed(len(noise))
        drawn.clear()
        config = rb.Config(seed=seed, out=tmp_path / "out", batch_size=4, epochs=1, device="cpu")
        rb.fit(make_student(), None, rb.TrainingViews(samples, 32, "none", config), config, int)
        assert noise.setdefault((seed, rank), list(drawn)) == drawn
    assert len(set(sum(noise.values(), []))) == 9  # three steps each

def test_schedule():
    config = rb.Config(lr=2.0, warmup=4)
    assert [rb.learning_rate(step, 44, config) for step in range(5)] == [0.5, 1, 1.5, 2, 2]
    assert rb.learning_rate(24, 44, config) == pytest.approx(1)  # half of the cosine
    assert rb.learning_rate(0, 5, config) == 2.0  # warm-up is at most a fifth of all steps

def test_processes_share_every_step_and_the_probe(samples, monkeypatch):
    config = rb.Config(batch_size=9, epochs=2, device="cpu", workers=0)
    whole = list(rb.training_keys(20, rb.Config(batch_size=8, epochs=2), 0))
    assert list(rb.training_keys(20, rb.Config(batch_size=8, epochs=2), 3)) == whole[24:]
    monkeypatch.setattr(rb, "PROCESSES", 2)
    assert rb.count_steps(20, config) == (4, 2)  # steps of eight images
    shares = []
    probed = []
    for rank in (0, 1):
        monkeypatch.setattr(rb, "RANK", rank)
        shares.append(list(rb.training_keys(20, config, 0)))
        for _, labels in rb.centre_batches(samples, 32, config, "features"):
            probed += labels.tolist()
    assert sorted(probed) == list(range(12))
    for step in range(4):
        both = shares[0][4 * step:4 * step + 4] + shares[1][4 * step:4 * step + 4]
        assert sorted(both) == sorted(whole[8 * step:8 * step + 8])

# --- Real processes -------------------------------------------------------------------------------

def forked(arguments, rank=0, processes=1, port=0, pause=0.0):
    """A process that runs the command line as torchrun would, without importing torch again."""
    def run():
        rb.RANK = rank
        rb.PROCESSES = processes
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        training_step = rb.training_step

        def slow_step(*arguments):
            time.sleep(pause)
            return training_step(*arguments)

        rb.training_step = slow_step
        sys.exit(rb.main(arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process

def wait_for_another(path, process):
    """Until the process has written the file anew: each file has a number of its own."""
    before = path.stat().st_ino if path.exists() else None
    while process.is_alive():
        if path.exists() and path.stat().st_ino != before:
            return
        time.sleep(0.005)

def test_killed_three_times_it_ends_with_the_same_weights(trained, tmp_path, capsys):
    out = tmp_path / "killed.pt"
    state = tmp_path / "killed.pt.state"
    flags = ["--epochs=3", "--save-every=1", "--batch-size=5"]
    assert rb.main(robustify(trained, tmp_path / "whole.pt", *flags)) == 0
    arguments = robustify(trained, out, *flags, "--resume")
    for _ in range(3):
        process = forked(arguments, pause=0.3)
        wait_for_another(state, process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 3 <= rb.read_checkpoint(state, "state")["step"] < 9
    assert rb.main([*arguments, "--temperature=3"]) == 2
    assert "temperature was 2.0 and is now 3.0" in capsys.readouterr().err
    assert rb.main(arguments) == 0
    assert not state.exists()
    tuned = rb.read_checkpoint(out, "plug-in")["tuned"]
    assert states_equal(tuned, rb.read_checkpoint(tmp_path / "whole.pt", "plug-in")["tuned"])

def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]

@pytest.mark.parametrize("case", ["three-heads", "ft", "vit", "resnet"])
def test_two_processes_equal_one(case, trained, tmp_path):
    """Within 1e-5, after two steps without dropout. A network with batch norm that begins at random
    weights averages its statistics: those of its first norm are of all images."""
    same = ["--dropout=0", "--block-dropout=0", "--lr=1e-3"]
    commands = []
    for name in ("one.pt", "two.pt"):
        if case == "vit":
            command = make_teacher(trained, tmp_path / name, "vit_tiny_patch16_224", VIT)
        elif case == "resnet":
            command = make_teacher(trained, tmp_path / name) + ["--batch-size=16"]
        else:
            command = robustify(trained, tmp_path / name, "--recipe", case)
        commands.append(command + same)
    assert rb.main(commands[0]) == 0
    if case == "three-heads":
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2",
                    f"--master-port={free_port()}"]
        subprocess.run([sys.executable, *torchrun, rb.__file__, *commands[1]], check=True)
    else:
        port = free_port()
        pair = [forked(commands[1], rank, 2, port) for rank in (0, 1)]
        for process in pair:
            process.join()
            assert process.exitcode == 0
    part = "tuned" if case in ("three-heads", "ft") else "state"
    one, two = [rb.read_checkpoint(tmp_path / name, "any")[part] for name in ("one.pt", "two.pt")]
    if case == "resnet":
        one = {"stem.net.bn1.running_mean": one["stem.net.bn1.running_mean"]}
    for name, value in one.items():
        assert torch.allclose(two[name].float(), value.float(), atol=1e-5), name

@pytest.mark.parametrize("classes", [("ant", "bee"), ("cow", "dog")])
def test_fewer_images_than_processes(classes, trained, tmp_path, monkeypatch, capsys):
    """Also where a probe for other classes would come first."""
    monkeypatch.setattr(rb, "PROCESSES", 50)
    monkeypatch.setattr(rb, "RANK", 49)
    monkeypatch.setattr(rb, "join_processes", Mock())
    flags = ["--data", str(make_folder(tmp_path / "data", classes)), "--recipe=apt"]
    assert rb.main(robustify(trained, tmp_path / "out.pt", *flags)) == 2
    assert "processes" in capsys.readouterr().err.splitlines()[-1]

def test_processes_that_cannot_meet(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rb, "PROCESSES", 2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert rb.main(robustify(trained, tmp_path / "out.pt")) == 2
    line, = capsys.readouterr().err.splitlines()
    assert "MASTER_ADDR" in line

# --- Corruptions ----------------------------------------------------------------------------------

UNORDERED = ("saturate", "elastic_transform")  # as published: 1 takes colour away, 5 adds some
DETERMINISTIC = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate",
                 "jpeg_compression", "gaussian_blur", "saturate")

def photographs(count, size=32):
    """Smooth coloured images, each with its own brightest value, 255."""
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise, (size, size), mode="bilinear")
    return (255 * smooth / smooth.amax((1, 2, 3), keepdim=True)).round().byte()

def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]

def parameters_at_32(name, severity):
    return {key: rows[2][severity - 1] for key, rows in ev.PARAMETERS[name].items()}

def write_frost(folder, shape):
    """Five photos of noise and a sixth, black one."""
    for number in range(1, 6):
        shade = np.random.default_rng(number).integers(0, 255, shape + (3,)).astype(np.uint8)
        Image.fromarray(shade).save(folder / f"frost{number}.png")
    Image.new("RGB", (shape[1], shape[0])).save(folder / "frost6.jpg")
    return str(folder)

@pytest.fixture(scope="module")
def frost(tmp_path_factory):
    return write_frost(tmp_path_factory.mktemp("frost"), (400, 500))

def test_names():
    assert len(ev.FIFTEEN) == 15
    assert ev.FIFTEEN[0] == "gaussian_noise"
    assert ev.FIFTEEN[14] == "jpeg_compression"
    assert list(ev.CORRUPTIONS) == list(ev.FIFTEEN + ev.VALIDATION)  # a place in it seeds the draws
    for columns in ev.PARAMETERS.values():
        for rows in columns.values():
            assert [len(row) for row in rows] == [5, 5, 5]

@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", ev.CORRUPTIONS)
def test_corruption(name, size, frost):
    images = photographs(4, size) // 2  # dark: what adds light is not cut off
    change = {}
    for severity in (1, 5):
        together = ev.corrupt(images, name, severity, range(10, 14), 1, frost)
        assert together.shape == images.shape
        assert together.dtype == torch.uint8
        for i in (0, 3):
            alone = ev.corrupt(images[i:i + 1], name, severity, [10 + i], 1, frost)
            assert torch.equal(alone[0], together[i])
        change[severity] = (together.float() - images.float()).abs().mean((1, 2, 3))
        assert change[severity].min() > 0
    if name not in UNORDERED:
        assert change[5].mean() > change[1].mean()
    other_indices = ev.corrupt(images, name, 5, range(20, 24), 1, frost)
    other_seed = ev.corrupt(images, name, 5, range(10, 14), 2, frost)
    assert torch.equal(other_indices, together) == (name in DETERMINISTIC)
    assert torch.equal(other_seed, together) == (name in DETERMINISTIC)

@pytest.mark.parametrize("name", ev.CORRUPTIONS)
def test_corruption_of_large_batches_in_any_order(name, frost):
    count = 2 * ev.CHUNK + 3
    images = photographs(count, 16)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    straight = ev.corrupt(images, name, 3, range(count), 0, frost)
    mixed = ev.corrupt(images[order], name, 3, order.tolist(), 0, frost)
    assert torch.equal(mixed, straight[order])

def test_draws_depend_on_name_and_severity():
    grey = torch.full((2, 3, 64, 64), 128).byte()
    patterns = []
    for name, severity in (("gaussian_noise", 3), ("gaussian_noise", 4), ("speckle_noise", 3)):
        noisy = ev.corrupt(grey, name, severity, range(2)).float()
        patterns.append(noisy.flatten())
    related = torch.corrcoef(torch.stack(patterns)) - torch.eye(3)
    assert related.abs().max() < 0.05

@pytest.mark.parametrize("name", ev.CORRUPTIONS)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_corruption_of_small_images(name, size, frost):
    images = photographs(2, size)
    for severity in range(1, 6):
        found = ev.corrupt(images, name, severity, range(2), 0, frost)
        assert found.shape == images.shape
        if size == 1 and ("blur" in name or name in ("elastic_transform", "pixelate")):
            assert (found.int() - images.int()).abs().max() <= 1  # there is nothing to mix with

@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
                                  "gaussian_blur", "elastic_transform", "pixelate"])
def test_blur_keeps_flat_images(name):
    flat = torch.tensor([30, 128, 250]).byte()[:, None, None].expand(1, 3, 64, 64)
    for severity in (1, 5):
        found = ev.corrupt(flat, name, severity, [0])
        assert (found.int() - flat.int()).abs().max() <= 1

def test_corruption_takes_square_images():
    with pytest.raises(ev.Refusal, match="square images, not 12 x 8 px"):
        ev.corrupt(torch.zeros(1, 3, 8, 12).byte(), "fog", 1, [0])

def test_frost_photos_smaller_than_the_image(tmp_path):
    small = write_frost(tmp_path, (20, 30))
    for size in (8, 64, 250):
        found = ev.corrupt(photographs(3, size), "frost", 5, range(3), 0, small)
        assert found.shape == (3, 3, size, size)

def test_frost_mixes_five_photos_by_its_weights(tmp_path):
    for number in range(1, 7):
        Image.new("RGB", (400, 300), (40 * number,) * 3).save(tmp_path / f"frost{number}.png")
    grey = torch.full((40, 3, 224, 224), 50).byte()
    found = ev.corrupt(grey, "frost", 2, range(40), 0, str(tmp_path))
    expected = [0.8 * 50 + 0.6 * 40 * number for number in range(1, 6)]
    assert found.unique().tolist() == expected  # never the sixth photo

def test_check_frost(frost, tmp_path):
    assert [file.name for file in ev.check_frost(frost)] == [f"frost{i}.png" for i in range(1, 6)]
    write_frost(tmp_path, (20, 30))
    (tmp_path / "frost3.png").unlink()
    with pytest.raises(ev.Refusal, match="has no frost3"):
        ev.check_frost(tmp_path)
    with pytest.raises(ev.Refusal, match="nowhere"):
        ev.check_frost(tmp_path / "nowhere")

@pytest.mark.parametrize("severity", [1, 3, 5])
def test_brightness_and_saturate_are_hsv(severity):
    images = photographs(2)
    images[0, :, :4] = torch.arange(32).byte() * 8  # greys, from black on
    added = parameters_at_32("brightness", severity)["amount"]
    saturate = parameters_at_32("saturate", severity)
    bright = ev.corrupt(images, "brightness", severity, range(2))
    saturated = ev.corrupt(images, "saturate", severity, range(2))
    for image in range(2):
        for row, column in np.ndindex(32, 32):
            red, green, blue = (images[image, :, row, column] / 255).tolist()
            h, s, v = colorsys.rgb_to_hsv(red, green, blue)
            expected = colorsys.hsv_to_rgb(h, s, min(v + added, 1))
            found = bright[image, :, row, column].tolist()
            assert found == pytest.approx(255 * np.array(expected), abs=1.001)
            s = min(s * saturate["factor"] + saturate["shift"], 1)
            expected = colorsys.hsv_to_rgb(h, s, v)
            found = saturated[image, :, row, column].tolist()
            assert found == pytest.approx(255 * np.array(expected), abs=1.001)

@pytest.mark.parametrize("severity", [1, 3, 5])
def test_contrast_by_hand(severity):
    images = photographs(3)
    factor = parameters_at_32("contrast", severity)["factor"]
    found = ev.corrupt(images, "contrast", severity, range(3)).numpy()
    x = images.numpy().astype(float)
    mean = x.mean((2, 3), keepdims=True)
    lost = factor * x + (1 - factor) * mean - found
    assert lost.min() > -0.001  # levels are cut, not rounded
    assert lost.max() < 1.001
    assert lost.mean() == pytest.approx(0.5, abs=0.05)

def pillow_jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)

def test_jpeg_is_pillows():
    images = photographs(3)
    published = ev.jpeg_85(images)
    for image, found in zip(images, published):
        assert torch.equal(found, pillow_jpeg(image, 85))
    for severity in (1, 3, 5):
        quality = parameters_at_32("jpeg_compression", severity)["quality"]
        compressed = ev.corrupt(images, "jpeg_compression", severity, range(3))
        for image, found in zip(images, compressed):
            assert torch.equal(found, pillow_jpeg(image, quality))

def test_pixelate_by_hand():
    images = photographs(2, 224)
    found = ev.corrupt(images, "pixelate", 2, range(2))  # halves the size
    blocks = F.avg_pool2d(images.float(), 2)
    expected = F.interpolate(blocks, scale_factor=2, mode="nearest")
    assert (found.float() - expected).abs().max() <= 1  # Pillow rounds twice

@pytest.mark.parametrize("name", ["gaussian_noise", "speckle_noise", "shot_noise", "impulse_noise"])
def test_noise_statistics(name):
    grey = torch.full((4, 3, 64, 64), 128).byte()
    x = 128 / 255
    amount = list(ev.PARAMETERS[name].values())[0][1][2]
    deviation = {
        "gaussian_noise": amount,
        "speckle_noise": x * amount,
        "shot_noise": math.sqrt(x / amount),  # Poisson: the variance is the mean
        "impulse_noise": math.sqrt(amount) / 2}
    noisy = ev.corrupt(grey, name, 3, range(4)) / 255
    assert abs(noisy.mean() - x) < 0.004  # half a level is lost where noise is truncated
    assert noisy.std().item() == pytest.approx(deviation[name], rel=0.03)

def test_gaussian_is_a_convolution():
    x = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    for sigma, mode in ((0.9, "edge"), (5, "symmetric")):  # the second kernel is wider than x
        found = ev.gaussian(x, sigma, truncate=3, mode=mode)[0, 0].numpy()
        radius = int(3 * sigma + 0.5)
        kernel = np.exp(-np.arange(-radius, radius + 1)**2 / (2 * sigma**2))
        kernel = kernel / kernel.sum()
        expected = np.pad(x[0, 0].numpy(), radius, mode)
        for axis in (0, 1):
            expected = np.apply_along_axis(np.convolve, axis, expected, kernel, "valid")
        assert found == pytest.approx(expected, abs=1e-5)

@pytest.mark.parametrize("size", [6, 24])
def test_defocus_is_a_disk(size):
    image = photographs(1, size)[0, 0] / 255
    found = ev.defocus_blur(image.expand(1, 3, -1, -1), None, radius=3, alias=0.01)[0, 1]
    padded = np.pad(image.numpy(), 3, "reflect")
    expected = np.zeros((size, size))
    for down, right in np.ndindex(7, 7):
        if (down - 3)**2 + (right - 3)**2 <= 9:
            expected += padded[down:down + size, right:right + size] / 29
    assert found.numpy() == pytest.approx(expected, abs=1e-5)

@pytest.mark.parametrize("shift", [1, 2, 3])
def test_glass_blur_is_a_loop_over_pixels(shift):
    n = 16
    x = torch.rand(2, 3, n, n, generator=torch.Generator().manual_seed(0))
    x = ev.levels(x) / 255
    found = ev.glass_blur(x, generators(2), sigma=0.05, shift=shift, rounds=3)  # too narrow to blur
    for image, generator in zip(x, generators(2)):
        for _ in range(3):
            moves = torch.randint(-shift, shift, (2, n, n), generator=generator)
            for row in range(n - shift, shift, -1):
                for column in range(n - shift, shift, -1):
                    down, right = moves[:, row, column].tolist()
                    image[:, row, column] = image[:, row + down, column + right]
    assert torch.allclose(found, x, atol=1e-6)

def test_motion_blur_of_a_point():
    x = torch.zeros(1, 3, 31, 31)
    x[:, :, 15, 15] = 1
    weights = np.exp(-np.arange(11)**2 / (2 * 3**2))
    right_to_left = ev.motion_blur(x, generators(1), radius=5, sigma=3, low=0, high=1e-6)[0, 0]
    expected = np.zeros((31, 31))
    expected[15, 15:4:-1] = np.floor(255 * weights / weights.sum())
    assert 255 * right_to_left.numpy() == pytest.approx(expected, abs=0.01)
    upwards = ev.motion_blur(x, generators(1), radius=5, sigma=3, low=90, high=90.0001)[0, 0]
    assert 255 * upwards.numpy() == pytest.approx(expected.T, abs=0.01)

def test_zoom_blur_of_a_line():
    n = 224
    line = torch.rand(n, generator=torch.Generator().manual_seed(0))
    total = line.numpy().copy()
    for step in range(12):  # 1.11 itself, too: arange rounds
        factor = 1 + step / 100
        crop = math.ceil(n / factor)
        size = round(crop * factor)
        read = (n - crop) // 2 + np.linspace(0, crop - 1, size)[(size - n) // 2:][:n]
        total += np.interp(read, np.arange(n), line.numpy())
    found = ev.zoom_blur(line.expand(1, 3, n, n), None, stop=1.11, step=0.01)[0, 0, 0]
    assert found.numpy() == pytest.approx(total / 13, abs=1e-4)

def test_snow_brightens_and_is_symmetric():
    black = torch.zeros(2, 3, 64, 64).byte()
    found = ev.corrupt(black, "snow", 3, range(2)).int()
    assert torch.equal(found[:, 0], found[:, 2])
    turned = found.rot90(2, (2, 3))
    assert (found - turned).abs().max() <= 1  # each layer comes with itself, turned by 180 degrees
    assert found.min() >= 38  # (1 - 0.7) * 0.5 of white

def test_fog_keeps_the_maximum_and_is_a_fractal():
    images = photographs(4, 64)
    images[1] = images[1] // 2
    found = ev.corrupt(images, "fog", 5, range(4))
    assert torch.all(found.amax((1, 2, 3)) <= images.amax((1, 2, 3)))
    cloud = ev.plasma(generators(8), 64, decay=2)
    assert torch.all(cloud.amin((1, 2)) == 0)
    assert torch.all(cloud.amax((1, 2)) == 1)
    near = (cloud[:, :, 1:] - cloud[:, :, :-1]).abs().mean()
    far = (cloud[:, :, 16:] - cloud[:, :, :-16]).abs().mean()
    assert far > 4 * near  # smooth at small distances
    rough = ev.plasma(generators(8), 64, decay=1.2)
    assert (rough[:, :, 1:] - rough[:, :, :-1]).abs().mean() > 2 * near

def test_elastic_transform_moves_little():
    n = 64
    line = torch.linspace(0, 1, n)
    position = torch.stack([line.expand(n, n), line[:, None].expand(n, n), torch.zeros(n, n)])[None]
    found = ev.elastic_transform(position, generators(1), alpha=0, sigma=0, affine=2)
    moved = (found - position)[:, :2, 16:48, 16:48] * (n - 1)
    assert 0.1 < moved.abs().max() < 8  # three points within 2 px, and what they span
    second = moved.diff(dim=2).diff(dim=2)
    assert second.abs().max() < 1e-3  # affine
    still = ev.elastic_transform(position, generators(1), alpha=1e-6, sigma=2, affine=0)
    assert torch.allclose(still, position, atol=1e-4)
    bent = ev.elastic_transform(position, generators(1), alpha=10, sigma=2, affine=0)
    moved = (bent - position)[:, :2, 16:48, 16:48] * (n - 1)
    # Uniform noise has variance 1/3, and a Gaussian of 2 px leaves 1 / (4 pi 2^2) of it.
    expected = 10 * math.sqrt(1 / 3 / (4 * math.pi * 2**2))
    assert moved.std().item() == pytest.approx(expected, rel=0.25)

# --- A stand-in network that reads what an image shows from its pixel -----------------------------

def concept(name):
    """What a class name means; a number is the class of ImageNet."""
    if name.isdecimal():
        return int(name)
    return CONCEPTS.index(name)

def one_hot(names):
    return F.one_hot(torch.tensor([concept(name) for name in names]), len(CONCEPTS)).float()

def written(best, second, size=32, border=0):
    """(size, size, 3) uint8 that shows one concept, and less clearly another."""
    code = concept(best) * 2000 + concept(second)
    pixel = (code >> 16, code >> 8 & 255, code & 255)
    image = np.full((size, size, 3), pixel, np.uint8)
    return np.pad(image, ((border, border), (border, border), (0, 0)))

class Eyes(nn.Module):
    """pixels (B, 3, H, W) -> (B, concepts)"""

    def __init__(self):
        super().__init__()
        self.tensor = nn.Buffer(torch.zeros(1))

    def forward(self, pixels):
        digits = (pixels[:, :, 0, 0] * 255).round().long()
        code = (digits * torch.tensor([65536, 256, 1])).sum(1)
        rows = range(len(code))
        features = torch.zeros(len(code), len(CONCEPTS))
        features[rows, code % 2000] = 0.3
        features[rows, code // 2000] = 0.7
        return features

class Reader(rb.Network):
    """A Network that knows `names`, or the text of any name where it has a text encoder."""

    def __init__(self, names, known=True, reads_text=False, size=32):
        nn.Module.__init__(self)
        self.eyes = Eyes()
        self.size = size
        self.class_names = names if known else None
        self.text_embeddings = None
        self.classifier = None
        if reads_text:
            self.text_embeddings = self.read_text
        else:
            self.classifier = nn.Linear(len(CONCEPTS), len(names), bias=False)
            self.classifier.weight.data = 10 * one_hot(names)

    def features(self, pixels):
        return self.eyes(pixels)

    def forward(self, pixels):
        return self.classifier(self.features(pixels))

    def read_text(self, names, templates, device):
        return one_hot(names), 10.0

def zero_shot_plug_in(names, seed=0):
    """A student of --zero-shot that was tuned on classes `names`."""
    classifier = rb.CosineClassifier(one_hot(names), 10.0, trained=False)
    config = rb.Config(recipe="apt", zero_shot=True, seed=seed, dropout=0.01)
    eyes = nn.Sequential(Eyes())
    student = rb.RobustStudent(eyes, nn.Sequential(), nn.Sequential(classifier), config)
    student.size = 32
    student.class_names = list(names)
    student.text_embeddings = Reader([], reads_text=True).text_embeddings
    return student

MODELS = {
    "imagenet": partial(Reader, WNIDS, known=False),
    "wnids": partial(Reader, [*FISH[::-1], WNIDS[10], WNIDS[409], WNIDS[530], WNIDS[954]]),
    "names": partial(Reader, ["bee", "ant"]),
    "numbers": partial(Reader, ["0", "1", "10", "2", "3"]),
    "other 1000": partial(Reader, ["ant", "bee"] * 500),
    "clip": partial(Reader, [], reads_text=True),
    "zero-shot": partial(zero_shot_plug_in, ["ant", "bee", "cow"])}

def write_images(root, images):
    """{path: array} as PNG files."""
    for path, image in images.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / path)
    return root

def three_of(names, outside):
    """Of each class one image that all models get right, one whose first guess is no class of the
    folder, and one that is wrong: right are two thirds, of all outputs one third."""
    images = {}
    for name, wrong in zip(names, [*names[1:], names[0]]):
        images[f"{name}/0.png"] = written(name, outside)
        images[f"{name}/1.png"] = written(outside, name)
        images[f"{name}/2.png"] = written(wrong, outside)
    return images

@pytest.fixture
def evaluate(monkeypatch, tmp_path, capsys):
    """(models, data, flags) -> (exit code, {column: {set: {predictor: accuracy}}}, printed text); a
    model is a name of MODELS, a set FOLDER or FOLDER/CORRUPTION/SEVERITY."""
    monkeypatch.setattr(ev, "load_network", lambda name, *_: MODELS[name]())
    monkeypatch.setattr(ev, "load", lambda name: MODELS[name.removesuffix(".pt")]())
    monkeypatch.setattr(ev, "read_checkpoint", lambda *_: {"format": "robustify plug-in"})

    def run(models, data, *flags):
        file = tmp_path / "out.json"
        file.unlink(missing_ok=True)
        code = ev.main([*EVAL, "--model", *models, "--data", *map(str, data), "--json", str(file),
                        *flags])
        found = {}
        if file.is_file():
            content = json.loads(file.read_text())
            for one in content["sets"]:
                name = one["folder"]
                if one["corruption"]:
                    name += f"/{one['corruption']}/{one['severity']}"
                for column, accuracy in one["accuracy"].items():
                    found.setdefault(column, {})[name] = accuracy
            found["partial"] = content["partial"]
        output = capsys.readouterr()
        return code, found, output.out + output.err.rpartition("eval.py: ")[2]

    return run

# --- Folder kinds x model kinds -------------------------------------------------------------------

CLOCK, RADIO, BANANA = WNIDS[530], WNIDS[409], WNIDS[954]
OTHER = WNIDS[10]
FOLDERS = {
    "wnids": three_of(FISH, OTHER),
    "numbers": three_of(["1", "10", "2"], "0"),  # sorted as text, as folders are
    "names": three_of(["ant", "bee"], OTHER),
    "no wnids": three_of([FISH[0], "n00000000"], OTHER),
    "one class": three_of(["images"], OTHER),
    "objectnet": {  # two outputs mean a clock, a box is no class of ImageNet's
        "images/z_clock/0.png": written(CLOCK, OTHER, border=2),
        "images/z_clock/1.png": written(OTHER, RADIO, border=2),
        "images/banana/0.png": written(BANANA, OTHER, border=2),
        "images/banana/1.png": written(OTHER, BANANA, border=2),
        "images/banana/2.png": written(CLOCK, BANANA, border=2),
        "images/box/0.png": written(BANANA, OTHER, border=2)}}

def make_set(kind, root):
    """The images of a row of FOLDERS; ObjectNet also has mappings, by the order of its labels."""
    write_images(root, FOLDERS[kind])
    if kind == "objectnet":
        labels = {"z_clock": "Alarm clock", "box": "Box", "banana": "Banana"}
        outputs = {"409": 0, "530": 0, "954": 1}
        (root / "mappings").mkdir()
        for name, content in (("folder_to_objectnet_label", labels),
                              ("imagenet_pytorch_id_to_objectnet_id", outputs)):
            (root / f"mappings/{name}.json").write_text(json.dumps(content))
    return root

TWO, ONE = 2 / 3, 1 / 3
GRID = {  # (accuracy, of all outputs), or a word of the refusal
    ("wnids", "imagenet"): (TWO, ONE), ("wnids", "wnids"): (TWO, ONE), ("wnids", "names"): "lacks",
    ("wnids", "numbers"): "lacks", ("wnids", "other 1000"): "lacks", ("wnids", "clip"): (TWO, ONE),
    ("wnids", "zero-shot"): (TWO, ONE),
    ("numbers", "imagenet"): (TWO, ONE), ("numbers", "wnids"): (TWO, ONE),
    ("numbers", "names"): "lacks", ("numbers", "numbers"): (TWO, ONE),
    ("numbers", "other 1000"): "lacks", ("numbers", "clip"): (TWO, ONE),
    ("numbers", "zero-shot"): (TWO, ONE),
    ("names", "imagenet"): "lacks", ("names", "wnids"): "lacks", ("names", "names"): (TWO, TWO),
    ("names", "numbers"): "lacks", ("names", "clip"): (TWO, TWO),
    ("names", "zero-shot"): (TWO, TWO),
    ("objectnet", "imagenet"): (0.8, 0.4), ("objectnet", "wnids"): (0.8, 0.4),
    ("objectnet", "names"): "lacks", ("objectnet", "other 1000"): "lacks",
    ("objectnet", "clip"): (0.8, 0.4), ("objectnet", "zero-shot"): (0.8, 0.4),
    ("no wnids", "imagenet"): "lacks", ("no wnids", "clip"): "no class of ImageNet",
    ("one class", "clip"): "one class", ("one class", "zero-shot"): "one class",
    ("one class", "imagenet"): "lacks"}

@pytest.mark.parametrize("kind", FOLDERS)
def test_class_mapping(kind, evaluate, tmp_path):
    """Each cell of the table in eval.py's docstring; after it the same again in one run, where
    what a model scores must not depend on its company."""
    root = make_set(kind, tmp_path / "set")
    scored = {}
    for (folder, model), expected in GRID.items():
        if folder != kind:
            continue
        file = f"{model}.pt" if model == "zero-shot" else model
        code, found, text = evaluate([file], [root])
        if isinstance(expected, str):
            assert code == 2 and expected in text, (model, text)
            continue
        assert code == 0, text
        accuracy = found[model]["set"]
        assert (accuracy["answer"], accuracy["of all"]) == pytest.approx(expected), model
        scored[file] = accuracy
    if scored:
        code, found, _ = evaluate(scored, [root])
        assert {file: found[file.removesuffix(".pt")]["set"] for file in scored} == scored

def test_zero_shot_is_a_function_of_model_folder_and_templates(evaluate, tmp_path, monkeypatch):
    """Folders before it leave no trace; each list of names meets the text tower once; a plug-in
    keeps its own embeddings unless --templates are given."""
    kinds = ("names", "wnids", "objectnet", "numbers")
    sets = [make_set(kind, tmp_path / kind) for kind in kinds]
    readers = []
    read_text = Reader.read_text

    def spy(self, names, templates, device):
        readers.append((len(names), templates[0]))
        return read_text(self, names, templates, device)

    monkeypatch.setattr(Reader, "read_text", spy)
    monkeypatch.setitem(MODELS, "p", lambda: zero_shot_plug_in(["ant", "bee"]))
    monkeypatch.setitem(MODELS, "c", MODELS["clip"])
    alone = {}
    for data in sets:
        found = evaluate(["p.pt", "c"], [data])[1]
        for column in ("p", "c", "original"):
            alone.setdefault(column, {}).update(found[column])
    for data in (sets, sets[::-1]):
        found = evaluate(["p.pt", "c"], data)[1]
        found.pop("partial")
        assert found == alone
    openai = open_clip.OPENAI_IMAGENET_TEMPLATES[0]
    for model, flags, expected in (
            ("c", [], [(2, openai), (1000, openai)]), ("p.pt", [], [(1000, openai)]),
            ("p.pt", ["--templates", "a {}."], [(2, "a {}."), (1000, "a {}.")])):
        readers.clear()
        evaluate([model], sets, *flags)
        assert [(n, template if isinstance(template, str) else openai)
                for n, template in readers] == expected

# --- Layouts, views -------------------------------------------------------------------------------

def corrupted_tree(root, cells):
    """ImageNet-C's layout: cells {CORRUPTION/SEVERITY: how many of three classes are right}."""
    images = {}
    for cell, right in cells.items():
        for i, name in enumerate(FISH[:3]):
            shown = name if i < right else FISH[(i + 1) % 3]
            images[f"{cell}/{name}/0.png"] = written(shown, WNIDS[10])
    return write_images(root, images)

def mean_row(text):
    """{label: first number} of the tables in a printed text."""
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) > 1:
            rows.setdefault(cells[0], cells[1])
    return rows

def test_layouts_of_published_corruptions(evaluate, tmp_path):
    """Whole, partial and grouped trees, one corruption, one severity. A corruption counts once,
    however many severities it has; validation corruptions never; what is missing is named."""
    whole = corrupted_tree(tmp_path / "in-c", {
        "fog/1": 3, "fog/2": 3, "fog/3": 0, "blur/zoom_blur/1": 3, "speckle_noise/1": 0})
    (whole / "fog/4").mkdir()  # an empty folder of a stopped download
    code, found, text = evaluate(["imagenet"], [whole / "fog"])
    assert code == 0 and "missing: fog 4, fog 5" in text
    assert {name: a["answer"] for name, a in found["imagenet"].items()} == {
        "fog/fog/1": 1, "fog/fog/2": 1, "fog/fog/3": 0}
    assert mean_row(text)["mean of 1 corruptions"] == "66.7"
    _, found, _ = evaluate(["imagenet"], [whole / "fog/1"])
    assert found["imagenet"]["1/fog/1"]["answer"] == 1
    (whole / "blur").rename(tmp_path / "blur")
    code, found, text = evaluate(["imagenet"], [tmp_path / "blur"])
    assert found["imagenet"]["blur/zoom_blur/1"]["answer"] == 1
    (tmp_path / "blur/zoom_blur").rename(whole / "zoom_blur")
    code, found, text = evaluate(["imagenet"], [whole])
    assert "snow 1, snow 2" in text and len(found["imagenet"]) == 5
    rows = mean_row(text)
    assert (rows["fog"], rows["zoom_blur"], rows["speckle_noise"]) == ("66.7", "100.0", "0.0")
    assert rows["mean of 2 corruptions"] == "83.3" and rows["mean error"] == "16.7"
    assert "mCE" not in rows
    for wrong, flags, word in ((whole, ["--severity", "5"], "--severity"),
                               (whole, ["--corrupt", "fog"], "corrupted already")):
        code, _, text = evaluate(["clip"], [wrong], *flags)
        assert code == 2 and word in text

def test_mce_by_hand():
    """Independent sums over random results; only for ImageNet's 1000 classes under all fifteen."""
    rng = np.random.default_rng(0)
    key = ("m", "answer")
    folder = ev.Folder("in-c", "published", WNIDS, [], list(ev.FIFTEEN))
    clean = ev.Folder("val", "classes", WNIDS, [], held_out=True)
    clean.results = [(ev.TestSet([]), {key: rng.random(50) < 0.8})]
    error = {}
    for name in [*ev.FIFTEEN, "spatter"]:
        for severity in (1, 2, 3, 4, 5):
            right = rng.random(50) < 0.8 - 0.05 * severity
            folder.results.append((ev.TestSet([], name, severity), {key: right}))
            error.setdefault(name, []).append(1 - right.sum() / 50)
    mean = {name: sum(values) / 5 for name, values in error.items() if name != "spatter"}
    clean_error = 1 - clean.results[0][1][key].mean()
    rows = dict(ev.errors(folder, [folder, clean], [key]))
    assert rows["mean error"] == pytest.approx(sum(mean.values()) / 15)
    assert rows["mCE"] == pytest.approx(sum(mean[n] / ev.ALEXNET[n] for n in mean) / 15)
    assert rows["relative mCE"] == pytest.approx(sum(
        (mean[n] - clean_error) / (ev.ALEXNET[n] - (1 - 0.56522)) for n in mean) / 15)
    assert "relative mCE" not in dict(ev.errors(folder, [folder], [key]))
    folder.classes = WNIDS[:999]
    assert list(dict(ev.errors(folder, [folder], [key]))) == ["mean error"]
    folder.classes = WNIDS
    del folder.results[7]
    assert list(dict(ev.errors(folder, [folder], [key]))) == ["mean error"]

class Camera(Reader):
    """Remembers the pixels that it is shown, and leaves its name in a register."""

    def __init__(self, size, register):
        super().__init__(WNIDS, size=size)
        self.seen = []
        register[size] = self

    def features(self, pixels):
        self.seen.append(F.interpolate(pixels, (self.size, self.size)))
        return torch.zeros(len(pixels), len(CONCEPTS))

def noise(root, folder, *sizes):
    """Images of noise of these sizes."""
    rng = np.random.default_rng(0)
    images = {}
    for i, (height, width) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3))
        images[f"{folder}/{FISH[0]}/{i}.png"] = pixels.astype(np.uint8)
    write_images(root, images)
    return root / folder.split("/")[0]

def test_pixels_do_not_depend_on_company(evaluate, tmp_path, monkeypatch):
    """Models of 64, 224 and 336 px, clean and corrupted; of small squares, corrupted and resized by
    each; of published corruptions of several sizes. The first image decides nothing."""
    photos = noise(tmp_path, "photos", (1, 1), (75, 75), (300, 240), (240, 300), (500, 400))
    small = noise(tmp_path, "small", (9, 14), (32, 32), (32, 32), (32, 32))
    published = noise(tmp_path, "published/fog/1", (75, 75), (224, 224), (224, 224), (224, 224))
    cameras = {}
    names = ("64", "224", "336")
    for name in names:
        monkeypatch.setitem(MODELS, name, partial(Camera, int(name), cameras))
    for data in (photos, small, published):
        flags = ["--severity", "1", "--corrupt", "pixelate"][:2 if data == published else 4]
        alone = {}
        for name in names:
            assert evaluate([name], [data], *flags)[0] == 0
            alone[name] = cameras[int(name)].seen
        assert evaluate(names, [data], *flags)[0] == 0
        for name in names:
            together = cameras[int(name)].seen
            assert len(together) == len(alone[name]) == 1 + (data != published)
            assert all(torch.equal(a, b) for a, b in zip(alone[name], together))
        for path in data.rglob("[1-3].png"):
            if data != photos:
                whole = torch.tensor(np.asarray(Image.open(path))).permute(2, 0, 1)[None] / 255
                seen = alone["224"][0][int(path.stem)]
                assert torch.equal(seen, F.interpolate(whole, (224, 224))[0])

def test_names_do_not_collide():
    here = Path.cwd().name
    assert ev.short_names("--data", ["x/val", "y/val/", "z"]) == ["x/val", "y/val", f"{here}/z"]
    assert ev.short_names("--model", ["a/original.pt"]) == ["a/original"]
    assert ev.short_names("--model", ["a.pt", "a"]) == ["a.pt", "a"]
    assert ev.short_names("--model", ["b/robust.pt", "resnet50"]) == ["robust", "resnet50"]
    with pytest.raises(rb.Refusal, match="same"):
        ev.short_names("--model", ["a.pt", "./a.pt"])

# --- Real networks --------------------------------------------------------------------------------

def make_plug_in(path, seed=0, tuned=0, **settings):
    """A plug-in of a narrow ResNet of random weights, as if tuned: its heads disagree."""
    network = rb.load_network("resnet18", "none", 32, {**NARROW, "num_classes": 2}, seed)
    network.class_names = ["ant", "bee"]
    randomise(network, seed)
    with torch.no_grad():  # a classifier that decides differently from image to image
        features = network.eval().features(torch.rand(20, 3, 1, 1) * torch.rand(20, 3, 32, 32))
        network.classifier.weight *= 10
        network.classifier.bias = nn.Parameter(-network.classifier.weight @ features.mean(0))
    rb.save_network(network, path.with_name(f"student{seed}.pt"))
    network = rb.load_network(str(path.with_name(f"student{seed}.pt")))
    config = rb.Config(student=str(path.with_name(f"student{seed}.pt")), dropout=0.3, **settings)
    student = rb.assemble(network, config)
    generator = torch.Generator().manual_seed(100 + tuned)
    for p in (*student.shared.parameters(), *student.heads.parameters()):
        p.data += 0.5 * torch.randn(p.shape, generator=generator) * p.data.abs().mean()
    rb.save(student, path)
    return student

@pytest.fixture(scope="module")
def plug_ins(tmp_path_factory):
    """three.pt and apt.pt of student0.pt, other.pt of student1.pt; teacher.pt; data/, whose bees
    are red."""
    root = tmp_path_factory.mktemp("plug_ins")
    make_plug_in(root / "three.pt", fraction=0.9, teacher=str(root / "teacher.pt"))
    make_plug_in(root / "apt.pt", tuned=1, recipe="apt", fraction=0.9)
    make_plug_in(root / "other.pt", seed=1, fraction=0.2)
    wide = {**NARROW, "channels": [24, 24, 24, 24], "num_classes": 2}
    teacher = rb.load_network("resnet18", "none", 32, wide)
    teacher.class_names = ["ant", "bee"]
    rb.save_network(teacher, root / "teacher.pt")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for i in range(40):
            colour = rng.integers(0, 200, 3) * (0, 1, 1) + (200 * (i % 2), 0, 0)
            pixels = colour + rng.integers(0, 50, (32, 32, 3))
            write_images(root / "data" / part / ["ant", "bee"][i % 2],
                         {f"{i}.png": pixels.astype(np.uint8)})
    return root

def share(right):
    return pytest.approx(right.float().mean().item())

def images_and_labels(root):
    """All of a folder of class folders: pixels (n, 3, 32, 32), labels (n,)."""
    paths = sorted(root.glob("*/*.png"))
    images = torch.tensor(np.stack([np.asarray(Image.open(path)) for path in paths]))
    labels = torch.tensor([path.parent.name == "bee" for path in paths])
    return images.permute(0, 3, 1, 2) / 255, labels

def run(tmp_path, *flags):
    """The JSON of a run."""
    file = tmp_path / "out.json"
    assert ev.main([*EVAL, "--json", str(file), *map(str, flags)]) == 0
    return json.loads(file.read_text())

@torch.no_grad()
def test_every_predictor(plug_ins, tmp_path):
    """One pass over all columns against each model alone."""
    flags = ["--data", plug_ins / "data", "--average", "--alpha", 0, 0.5, 1, "--model"]
    files = [plug_ins / "three.pt", plug_ins / "apt.pt", plug_ins / "student1.pt"]
    accuracy = run(tmp_path, *flags, *files)["sets"][0]["accuracy"]
    pixels, labels = images_and_labels(plug_ins / "data/val")
    answers = []
    for name in ("three", "apt"):
        for alpha in (0.0, 0.5, 1.0):
            found = rb.load(plug_ins / f"{name}.pt", alpha=alpha).predict(pixels)
            answers.append(found.probabilities)
            column = accuracy[f"{name} alpha {alpha:g}"]
            assert column["answer"] == share(answers[-1].argmax(-1) == labels)
            if name == "three":
                right = {head: phi.argmax(-1) == labels for head, phi in found.phi.items()}
                assert {head: column[head] for head in rb.HEADS} == {
                    head: share(right[head]) for head in rb.HEADS}
                assert column["oracle"] == share(right["clean"] | right["unclean"])
                assert column["clean share"] == share(found.head == 0)
            else:
                assert "oracle" not in column
    answers.append(rb.load_network(str(plug_ins / "student1.pt")).eval()(pixels).softmax(-1))
    assert accuracy["student1"]["answer"] == share(answers[-1].argmax(-1) == labels)
    assert accuracy["average"]["answer"] == share(sum(answers).argmax(-1) == labels)
    student = rb.load_network(str(plug_ins / "student0.pt")).eval()
    assert accuracy["original"]["answer"] == share(student(pixels).argmax(-1) == labels)

@torch.no_grad()
def test_rules_and_passes_from_one_plug_in(plug_ins):
    """Each column against a student built with these settings and the same tuned weights."""
    args = ev.parse([*EVAL, "--data", "x", "--rule", "kl-u", "confidence", "--passes", "2", "30",
                     "--model", str(plug_ins / "three.pt")])
    columns = {column.name: column.model for column in ev.load_columns(args)}
    pixels, _ = images_and_labels(plug_ins / "data/val")
    student = rb.load(plug_ins / "three.pt")
    for rule in ("kl-u", "confidence"):
        for passes in (2, 30):
            config = rb.Config(**{**vars(student.config), "rule": rule, "passes": passes})
            other = rb.RobustStudent(student.backbone, *student.original, config)
            rb.load_tuned(other, {**rb.tuned_state(student), "masks": other.masks})
            expected = other.eval().predict(pixels)
            found = columns[f"three {rule} K {passes}"].predict(pixels)
            assert torch.allclose(found.probabilities, expected.probabilities, atol=1e-6)
            assert torch.equal(found.head, expected.head)

def test_originals_and_shared_backbones(plug_ins):
    """One original for each fingerprint, whatever files are called; plug-ins of one student share
    its backbone, those of another cut do not."""
    for name, source in (("original", "student1"), ("average", "other")):
        (plug_ins / f"{name}.pt").write_bytes((plug_ins / f"{source}.pt").read_bytes())
    models = [str(plug_ins / f"{n}.pt") for n in ("three", "original", "apt", "average", "other")]
    args = ev.parse([*EVAL, "--data", "x", "--model", *models])
    columns = ev.load_columns(args)
    folder = plug_ins.name
    assert [column.name for column in columns] == [
        f"original of {folder}/three", f"original of {folder}/average",
        *(f"{folder}/{n}" for n in ("three", "original", "apt", "average", "other"))]
    groups = ev.grouped(columns)
    assert sorted(len(group) for group in groups) == [1, 3, 3]

def test_what_was_finished_stays(plug_ins, tmp_path, monkeypatch, capsys):
    """A broken image, Ctrl-C: the sets before are printed and written, marked as partial."""
    tree = tmp_path / "c"
    for severity in (1, 2, 3):
        for path in (plug_ins / "data/val").glob("*/*.png"):
            copy = tree / "fog" / str(severity) / path.parent.name / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    flags = [*EVAL, "--data", str(plug_ins / "data"), str(tree), "--severity", "1", "2", "3",
             "--model", str(plug_ins / "three.pt"), "--json", str(tmp_path / "out.json")]
    (tree / "fog/2/bee/9.png").write_bytes(b"no image")
    outcomes = {}
    for kind in ("broken", "interrupted"):
        if kind == "interrupted":
            read = ev.read_image
            monkeypatch.setattr(ev, "read_image", lambda path: read(path) if "fog/2" not in path
                                else (_ for _ in ()).throw(KeyboardInterrupt))
        outcomes[kind] = ev.main(flags)
        found = json.loads((tmp_path / "out.json").read_text())
        output = capsys.readouterr()
        assert found["partial"] and len(found["sets"]) == 2 and "40 images (partial)" in output.out
        assert "fog/2/bee/9.png" in output.err or kind == "interrupted"
    assert outcomes == {"broken": 2, "interrupted": 130}

def multiplications(compute, *networks):
    """Of convolutions and linear layers while compute() runs, and of the backward pass after it:
    one forward, one for a weight's gradient, one for that of an input which has one."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        gradients = 0
        if torch.is_grad_enabled():
            gradients = module.weight.requires_grad + inputs[0].requires_grad
        total += module.weight[0].numel() * output.numel() * (1 + gradients)

    hooks = [module.register_forward_hook(count) for network in networks
             for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    compute()
    for hook in hooks:
        hook.remove()
    return total

def test_cost_by_hand(plug_ins, tmp_path):
    """GMACs against layers counted by hand: inference, and training with every second image
    augmented, whatever --batch-size; every recipe is cut from the whole network."""
    rows = run(tmp_path, "--cost", "--model", plug_ins / "three.pt", "--batch-size", 1)["tables"][0]
    found = {row[0]: float(row[1]) * 1e9 for row in rows[1:]}
    network = rb.load_original(plug_ins / "three.pt").eval()
    teacher = rb.load_network(str(plug_ins / "teacher.pt")).eval().requires_grad_(False)
    student = rb.load(plug_ins / "three.pt")
    one, four = torch.rand(1, 3, 32, 32), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        whole = multiplications(lambda: network(one), network)
    assert found["library's forward pass"] == pytest.approx(whole, rel=1e-3)
    of_predict = multiplications(lambda: student.predict(one), student)
    a_pass = 3 * student.heads["clean"].classifier.weight.numel()
    for k in (1, 5, 10):
        expected = of_predict + (k - 10) * a_pass
        assert found[f"three-heads, K = {k}"] == pytest.approx(expected, rel=1e-3)
    is_clean = torch.tensor([True, False, True, False])
    for name in rb.RECIPES:
        config = rb.Config(**{**vars(student.config), "recipe": name})
        student = rb.assemble(network, config).train()
        expected = multiplications(lambda: rb.student_loss(
            student, teacher, four, torch.zeros(4).long(), is_clean), student, teacher) / 4
        step, = [value for row, value in found.items() if row.startswith(f"train {name},")]
        assert step == pytest.approx(expected, rel=1e-3)

def test_transfer_features_are_where_tuning_acted(plug_ins, tmp_path):
    """Shared blocks, or what each head's classifier sees where nothing is shared; tokens of any
    kind are pooled."""
    tables = run(tmp_path, "--transfer", plug_ins / "data", "--model", plug_ins / "three.pt",
                 plug_ins / "other.pt", plug_ins / "student1.pt")["tables"]
    assert [row[0] for row in tables[0][1:]] == [
        "three, original", "three, tuned", "other, original", "other, clean head",
        "other, combined head", "other, unclean head", "student1, features"]
    assert tables[0][1][1] > 0.9 and "+-" in tables[0][2][2]
    pixels, _ = images_and_labels(plug_ins / "data/val")
    other = rb.load(plug_ins / "other.pt")
    features = ev.features(ev.Column("other", "plug-in", other, None), pixels)
    assert torch.allclose(other.original[1][-1](features["original"]).softmax(-1),
                          other.original_probabilities(other.backbone(pixels)))
    assert not torch.allclose(features["original"], features["clean head"])
    tokens = torch.rand(2, 5, 3)
    for class_token, expected in ((True, tokens[:, 0]), (False, tokens.mean(1))):
        other.class_token = class_token
        assert torch.equal(ev.pooled(other, tokens), expected)

def test_plot(plug_ins, tmp_path):
    pytest.importorskip("matplotlib")
    run(tmp_path, "--data", plug_ins / "data", "--corrupt", "contrast", "--severity", 1, 5, "--plot",
        tmp_path / "plot.png", "--model", plug_ins / "three.pt", plug_ins / "student1.pt")
    assert min(Image.open(tmp_path / "plot.png").size) > 300

@torch.no_grad()
def test_probe(plug_ins, tmp_path, monkeypatch):
    """A tower without a classifier: fitted on the views that are measured, small squares whole."""
    class Mean(Reader):
        def features(self, pixels):
            assert pixels.shape[2:] == (32, 32)
            return pixels.mean((2, 3))

    tower = Mean(["ant"], size=224)
    tower.classifier = None
    monkeypatch.setattr(ev, "load_network", lambda *_: tower)
    data = plug_ins / "data"
    found = run(tmp_path, "--data", data, "--probe", data, "--model", "mean")
    assert found["sets"][0]["accuracy"]["mean"]["answer"] == 1
    tower.classifier = None
    assert ev.main([*EVAL, "--data", str(plug_ins / "data"), "--model", "mean"]) == 2

# --- CLIP: rows of Tables 1 and 2 -----------------------------------------------------------------

@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP that open_clip knows as test-vit; zs.pt, a plug-in of --zero-shot for ant and
    bee; ve.pt, whose classifier was tuned."""
    root = tmp_path_factory.mktemp("clips")
    for name, zero_shot in (("zs", True), ("ve", False)):
        network = rb.load_network("test-vit", "none")
        network.class_names = ["ant", "bee"]
        network.classifier = rb.CosineClassifier(
            *network.text_embeddings(["ant", "bee"]), trained=not zero_shot)
        config = rb.Config(student="test-vit", pretrained="none", zero_shot=zero_shot, dropout=0.1)
        student = rb.assemble(network, config)
        for p in student.heads.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        rb.save(student, root / f"{name}.pt")
    return root

@torch.no_grad()
def test_clip_columns(clip, plug_ins, tmp_path):
    """Bare CLIP, a plug-in of --zero-shot and its original on classes that none was tuned on."""
    images, labels = images_and_labels(plug_ins / "data/val")
    new = tmp_path / "new"
    (new / "val").mkdir(parents=True)
    for old, name in (("ant", "elk"), ("bee", "fox")):
        os.symlink(plug_ins / "data/val" / old, new / "val" / name)
    found = run(tmp_path, "--data", plug_ins / "data", new, "--pretrained", "none", "--model",
                "test-vit", clip / "zs.pt")
    network = rb.load_network("test-vit", "none").eval()
    student = rb.load(clip / "zs.pt")
    for one, names in zip(found["sets"], (["ant", "bee"], ["elk", "fox"])):
        weight, scale = network.text_embeddings(names)
        rb.set_classes(network, names, weight, scale)
        rb.set_classes(student, names, weight, scale)
        right = {"test-vit": network(images), "original": network(images), "zs": student(images)}
        for column, outputs in right.items():
            share = (outputs.argmax(-1) == labels).float().mean().item()
            assert one["accuracy"][column]["answer"] == pytest.approx(share)
    rows = [table for table in found["tables"] if table[-2][0] == "average of shifts"]
    assert len(rows) == 1
    assert ev.main([*EVAL, "--data", str(new), "--model", str(clip / "ve.pt")]) == 2

# --- Real networks under torchrun -----------------------------------------------------------------

def test_each_image_counts_once_under_torchrun(plug_ins, tmp_path):
    """Three processes for 40 images; the shares differ in size."""
    flags = ["--data", plug_ins / "data", "--corrupt", "shot_noise", "--severity", 3,
             "--model", plug_ins / "three.pt"]
    one = run(tmp_path, *flags)["sets"]
    file = tmp_path / "three.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 3, "eval.py",
               *EVAL, *flags, "--json", file]
    subprocess.run([*map(str, command)], cwd=Path(__file__).parent, check=True)
    three = json.loads(file.read_text())["sets"]
    assert one == three and [s["n"] for s in one] == [40, 40]

# --- Command lines and refusals -------------------------------------------------------------------

NEW_VIT = ["--student=deit_tiny_patch16_224", "--pretrained=none"]

@pytest.mark.parametrize("flags, part", [  # @ is the test's folder, $ that of `trained`
    (["--data=@/nowhere"], "nowhere"), (["--data=@/empty"], "empty"), (["--data=@/flat"], "flat"),
    (["--data=@/hollow"], "cow"), (["--data=@/val"], "no train/"),
    (["--data=@/long"], "no train/"),
    (["--teacher=@/no.pt"], "--make-teacher"), (["--teacher="], "--teacher"),
    (["--teacher=$/robust.pt"], "robust.pt"), (["--data=@/other"], "teacher.pt"),
    (["--student=@/no.pt"], "no.pt"), (["--student=my_net"], "my_net"),
    (["--student="], "--student"), (["--student=swin_t", "--pretrained=none"], "SwinTransformer"),
    (["--student=resnet18", "--pretrained=nowhere"], "nowhere"),
    (["--image-size=64"], "--image-size"),
    (["--student=resnet18:@/flat/0.png"], "0.png"), (["--model-args={wings"], "--model-args"),
    (["--model-args=[1]"], "--model-args"), ([*NEW_VIT, '--model-args={"wings": 2}'], "wings"),
    ([*NEW_VIT, '--model-args={"num_heads": 5}'], "num_heads"),
    ([*NEW_VIT, '--model-args={"num_heads": 0}'], "deit"), (["--wings"], "--wings"),
    (["--rule=coin"], "coin"), (["--recipe=ours"], "three-heads"), (["--epochs=0"], "--epochs"),
    ([f"--seed={10**20}"], "--seed"), (["--batch-size=0"], "--batch-size"),
    (["--lr=nan"], "--lr"), (["--lr=1e39"], "--lr"),
    (["--dropout=1"], "--dropout"), (["--zero-shot"], "text"), (["--augment=none"], "--augment"),
    (["--zero-shot", "--recipe=lp"], "--recipe lp"), (["--device=cuda"], "cuda"),
    (["--zero-shot", "--make-teacher=resnet18"], "--make-teacher"), (["--out=@"], "--out"),
    (["--out=@/nowhere/out.pt"], "nowhere")])
def test_refusals_are_one_line(flags, part, trained, tmp_path, capsys):
    for folder in ("empty", "flat", "hollow/train/cow"):  # hollow: a class without images
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "flat/0.png")
    for root, second, folder in (("hollow", "ant", "train"), ("other", "cow", "train"),
                                 ("val", "bee", "val"), ("long", "bee", "training"),
                                 ("long", "bee", "validation")):
        make_folder(tmp_path / root, (second,), folder, n=1)
    before = sorted(tmp_path.rglob("*"))
    arguments = []
    for argument in robustify(trained, tmp_path / "out.pt", *flags):
        arguments.append(argument.replace("@", str(tmp_path)).replace("$", str(trained)))
    assert rb.main(arguments) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("robustify.py: ")
    assert part in line
    assert sorted(tmp_path.rglob("*")) == before

@pytest.mark.parametrize("flags", [
    ["--student=mine.pt", "--out=mine.pt"], ["--teacher=mine.pt", "--out=@/mine.pt"],
    ["--student=resnet18:mine.pt", "--out=./mine.pt"], ["--make-teacher=teacher.pt"],
    ["--student=resnet18", "--pretrained=mine.pt", "--out=link.pt"], ["--student=robust.pt"]])
def test_out_never_overwrites_a_source(flags, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.pt", "robust.pt", "teacher.pt"):  # the last two are the default of --out
        Path(name).write_bytes(b"precious")
    Path("link.pt").symlink_to("mine.pt")
    arguments = [flag.replace("@", str(tmp_path)) for flag in flags]
    assert rb.main(["--data", str(trained / "data"), *arguments]) == 2
    assert "overwrite" in capsys.readouterr().err
    assert all(path.read_bytes() == b"precious" for path in tmp_path.iterdir())

def test_demo_leaves_a_folder_of_others_alone(tmp_path):
    folder = make_folder(tmp_path / "demo", ["disk", "zebra"], n=1)
    before = sorted(folder.rglob("*"))
    with pytest.raises(rb.Refusal, match="demo"):
        rb.demo(folder)
    assert sorted(folder.rglob("*")) == before

def test_help(capsys):
    assert rb.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for word in ("Eq. 6", "three-heads", "distill_weight", "torchrun"):
        assert word in printed


@pytest.mark.parametrize("flags, fragment", [  # @ is the test's folder; later flags win
    (["--data", "@/nowhere"], "nowhere"), (["--data", "@/empty"], "empty"),
    (["--data", "@/flat"], "flat"), (["--data", "@/cows"], "cow"), (["--model", "no.pt"], "no.pt"),
    (["--model", "my_resnet"], "my_resnet"), (["--corrupt", "rain"], "rain"),
    (["--corrupt", "frost"], "--frost"), (["--frost", "@/empty"], "frost"),
    (["--severity", "6"], "--severity"), (["--wings"], "--wings"), (["--device", "cuda"], "cuda"),
    (["--templates", "photo"], "--templates"), (["--alpha", "2"], "--alpha"),
    (["--passes", "0"], "--passes"), (["--batch-size", "0"], "--batch-size"),
    (["--json", "@"], "in a folder"), (["--json", "@/no/out.json"], "in a folder"),
    (["--plot", "@/no/out.png"], "in a folder"), (["--plot", "@/out.png"], "--corrupt"),
    (["--plot", "@/out.gif"], ".png"), (["--cost", "--model", "@/student.pt"], "--cost"),
    (["--cost", "--model", "@/orphan.pt"], "gone.pt"), (["--transfer", "@/data"], "train"),
    (["--data", "@/objectnet"], "mappings"), (["--data", "@/levels"], "without severities"),
    (["--model", "@/student.pt", "@/./student.pt"], "same")])
def test_refusals_come_before_the_first_image(flags, fragment, plug_ins, tmp_path, monkeypatch,
                                              capsys):
    """One line on stderr, exit code 2, nothing read and nothing written."""
    for folder in ("empty", "flat"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "flat/0.png")
    pixels = np.zeros((32, 32, 3), np.uint8)
    write_images(tmp_path, {f"{path}/0.png": pixels for path in (
        "cows/ant", "cows/cow", "data/val/ant", "data/val/bee", "objectnet/images/ant",
        "levels/fog/ant", "levels/snow/ant")})
    (tmp_path / "objectnet/mappings").mkdir()
    for name in ("folder_to_objectnet_label", "imagenet_pytorch_id_to_objectnet_id"):
        (tmp_path / f"objectnet/mappings/{name}.json").write_text('{"ant": ["Ant"]}')
    (tmp_path / "student.pt").write_bytes((plug_ins / "student0.pt").read_bytes())
    config = rb.Config(student=str(tmp_path / "student.pt"), teacher=str(tmp_path / "gone.pt"))
    rb.save(rb.assemble(rb.load_network(config.student), config), tmp_path / "orphan.pt")
    monkeypatch.setattr(ev, "read_image", None)
    before = set(tmp_path.rglob("*"))
    flags = [flag.replace("@", str(tmp_path)) for flag in flags]
    data, model, out = (str(tmp_path / name) for name in ("data", "student.pt", "out.json"))
    assert ev.main([*EVAL, "--data", data, "--model", model, "--json", out, *flags]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("eval.py: ") and fragment in line
    assert set(tmp_path.rglob("*")) == before
