"""Tests of robustify.py and eval.py, each against an independent oracle; no downloads, no GPU."""

import colorsys
import contextlib
import copy
import doctest
import errno
import io
import json
import math
import multiprocessing
import os
import re
import shutil
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
from torchvision.transforms import v2

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
CONCEPTS = [*WNIDS, "ant", "bee", "cow", "dog", "n00000000", "images"]

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
            "--jsd=12", "--data", str(trained / "data"), "--out", str(out)]

def robustify(trained, out, *flags):
    """Arguments that robustify student.pt."""
    return ["--student", str(trained / "student.pt"), "--teacher", str(trained / "teacher.pt"),
            "--data", str(trained / "data"), *FLAGS, "--out", str(out), *flags]

# --- The split equals the library's whole network -------------------------------------------------

FAMILIES = {  # name: (library, name there, size, arguments)
    "CLIP ViT": ("open_clip", "test-vit", 32, {}),
    "CLIP ResNet": ("open_clip", "test-rn", 64, {}),
    "timm ViT": ("timm", "vit_tiny_patch16_224", 32, VIT),
    "mean of tokens": ("timm", "vit_tiny_patch16_224", 32,
                       {**VIT, "global_pool": "avg", "class_token": False}),
    "attention pool": ("timm", "vit_base_patch16_siglip_224", 32, VIT),
    "DINOv2": ("timm", "vit_small_patch14_reg4_dinov2", 28, {**VIT, "patch_size": 14}),
    "timm ResNet": ("timm", "resnet18", 32, NARROW),
    "EfficientNet": ("timm", "tf_efficientnet_lite0", 64, {}),
    "torchvision ViT": ("torchvision", "vit", 32, {
        "image_size": 32, "patch_size": 16, "num_layers": 3, "num_heads": 2, "hidden_dim": 32,
        "mlp_dim": 64, "representation_size": 24})}

def network_of(family):
    """(our Network, the library's network with a classifier), of the same random weights."""
    library, name, size, arguments = FAMILIES[family]
    if library == "open_clip":
        net = open_clip.create_model(name).visual
    elif library == "torchvision":
        net = torchvision.models.VisionTransformer(num_classes=5, **arguments)
    elif "patch" in name:
        net = timm.create_model(name, num_classes=5, img_size=size, **arguments)
    else:
        net = timm.create_model(name, num_classes=5, **arguments)
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
    x = images_of(4, network.size + 16)
    mean = torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    std = torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    small = F.interpolate(x, (network.size, network.size), mode="bicubic", antialias=True)
    normalised = ((small - mean) / std).contiguous(memory_format=torch.channels_last)
    expected = net(normalised)
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

def test_cut_is_the_best():
    """Against a brute-force count by parameter name."""
    network, _ = network_of("timm ViT")
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    whole = sum(sizes.values())
    for fraction, head_blocks in ((0.05, 1), (0.2, 0), (0.2, 2), (0.6, 1)):
        choices = [whole]
        for first in range(3 - head_blocks + 1):
            frozen = ("stem.", *[f"blocks.{i}." for i in range(first)])
            choices.append(sum(n for name, n in sizes.items() if not name.startswith(frozen)))
        best = min(choices, key=lambda n: abs(n / whole - fraction))
        config = rb.Config(fraction=fraction, head_blocks=head_blocks, recipe="apt")
        student = rb.assemble(network, config)
        assert sum(p.numel() for p in student.parameters() if p.requires_grad) == best
        assert len(student.heads["combined"].body) == head_blocks + 1  # and the pool

@pytest.mark.parametrize("recipe", ["lp", "ft"])
def test_what_a_recipe_tunes(recipe):
    """The classifier alone, or everything."""
    network = make_network()
    student = make_student(recipe=recipe)
    expected = rb.count_parameters(network if recipe == "ft" else network.classifier)
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == expected
    x = images_of(3)
    assert torch.equal(student.original(student.backbone(x)), network(x))

def test_share_is_printed_as_it_is(trained, tmp_path, capsys):
    flags = ["--fraction=0.05", "--recipe=apt"]
    assert rb.main(robustify(trained, tmp_path / "out.pt", *flags)) == 0
    student = rb.load(tmp_path / "out.pt")
    tuned = rb.count_parameters(student.shared, student.heads)
    share = tuned / (tuned + rb.count_parameters(student.backbone))
    printed = capsys.readouterr().out
    for text in (f"apt: {share:.1%} of", "shared nothing", "not --fraction 5.0%"):
        assert text in printed

# --- Gradients and loss ---------------------------------------------------------------------------

@pytest.mark.parametrize("recipe, is_random", [("three-heads", True), ("ft", False), ("ft", True)])
def test_training_leaves_the_frozen_alone(recipe, is_random):
    """Batch-norm statistics move only where a network begins at random weights and is tuned
    whole."""
    network = make_network()
    network.is_random = is_random
    student = rb.assemble(network, rb.Config(recipe=recipe, lr=1e-2))
    before = copy.deepcopy(student.state_dict())
    step_on(student, make_network(1), (images_of(8), torch.arange(8) % 4, torch.arange(8) < 4))
    for name, value in student.state_dict().items():
        moves = not name.startswith(("backbone.", "original.", "masks"))
        if "running" in name or "num_batches" in name:
            moves = moves and is_random and recipe == "ft"
        assert torch.equal(value, before[name]) != moves, name

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

@pytest.mark.parametrize("recipe, is_clean", [
    *[(recipe, [1, 0, 0, 1]) for recipe in rb.RECIPES],
    ("three-heads", [1, 1, 1, 1]), ("three-heads", [0, 0, 0, 0])])
def test_student_loss_is_the_slow_loss(recipe, is_clean):
    """Its value, and its gradient in each tensor: none where a head learns from no example."""
    student = differ(make_student(recipe=recipe, temperature=3.0, distill_weight=0.7))
    teacher = make_network(1)
    batch = images_of(4), torch.tensor([3, 1, 0, 2]), torch.tensor(is_clean).bool()
    results = []
    for loss_of in (rb.student_loss, slow_loss):
        student.zero_grad()
        loss = loss_of(student, teacher, *batch)
        loss.backward()
        gradients = {}
        for name, p in student.named_parameters():
            gradients[name] = torch.zeros(1) if p.grad is None else p.grad
        results.append({"loss": loss, **gradients})
    for name, slow in results[1].items():
        found = results[0][name]
        assert torch.allclose(found, slow.expand_as(found), rtol=1e-3, atol=1e-4), name

@torch.no_grad()
def test_teacher_loss():
    network = make_network()
    student = rb.assemble(network, rb.Config(recipe="ft-augmented"))
    views = images_of(6).reshape(2, 3, 3, 32, 32)
    labels = torch.tensor([0, 3])
    expected = 0.0
    for example, label in zip(views, labels):
        logits = network(example)
        expected -= Categorical(logits=logits[0]).log_prob(label) / 2
        mixture = Categorical(probs=logits.softmax(-1).mean(0))
        expected += 12.0 * kl_divergence(Categorical(logits=logits), mixture).mean() / 2
    assert torch.allclose(rb.teacher_loss(student, 12.0, views, labels), expected, rtol=1e-4)

@torch.no_grad()
def test_bfloat16():
    """A student that is cast as a whole predicts."""
    student = clip_student(trained=True)
    expected = student.predict(images_of(4)).phi
    found = student.to(torch.bfloat16).predict(images_of(4).to(torch.bfloat16)).phi
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
    assert 80 < rb.kl_divergence(one, one.roll(1, dims=1)) < math.inf

def test_mc_dropout_is_a_loop_over_masks():
    """A logit has the closed form of inverted dropout: variance p / (1 - p) * sum w^2 f^2."""
    torch.manual_seed(0)
    classifier = nn.Linear(16, 3)
    features = torch.randn(4, 16)
    masks = rb.dropout_masks(rb.Config(passes=4000, dropout=0.3), 16)
    closed = 0.3 / 0.7 * (features**2 @ classifier.weight.T**2)
    ratio = classifier(features[:, None] * masks).var(1, correction=0) / closed
    assert ratio.mean().item() == pytest.approx(1, abs=0.05)
    phi, uncertainty = rb.mc_dropout(classifier, features, masks[:7])
    for i, f in enumerate(features):
        passes = np.array([classifier(f * mask).softmax(-1).tolist() for mask in masks[:7]])
        assert phi[i].tolist() == pytest.approx(passes.mean(0).tolist(), abs=1e-6)
        assert uncertainty[i].item() == pytest.approx(passes.std(0).mean(), abs=1e-6)

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

@torch.no_grad()
def test_predict_returns_the_chosen_head():
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    config = rb.Config(dropout=0.4)
    student = rb.RobustStudent(nn.Identity(), nn.Sequential(), nn.Linear(16, 4), config)
    found = differ(student, 1.0).predict(x)
    u = {name: rb.mc_dropout(head.classifier, x, student.masks)[1]
         for name, head in student.heads.items()}
    assert torch.equal(found.head, rb.select_head(found.phi, u, "kl-u"))
    assert len(set(found.head.tolist())) == 2
    for i, index in enumerate(found.head):
        name = rb.HEADS[index]
        assert torch.equal(found.probabilities[i], found.phi[name][i])
        assert torch.equal(found.uncertainty[i], u[name][i])
        alone = student.predict(x[i:i + 1])  # whatever the batch
        assert torch.allclose(alone.probabilities[0], found.probabilities[i], atol=1e-6)
        assert torch.allclose(alone.uncertainty[0], found.uncertainty[i], atol=1e-6)

@torch.no_grad()
def test_modules_that_overwrite_their_input_do_no_harm():
    expected = rb.RobustStudent(**own_modules())
    student = rb.RobustStudent(**own_modules(Overwrites))
    z = student.backbone(images_of(4))
    student.original_probabilities(z)
    found = student.predict_from(z).phi
    for name, phi in expected.predict(images_of(4)).phi.items():
        assert torch.allclose(found[name], phi, atol=1e-6)

def test_dropout_acts_while_training():
    """On what a block adds, here 1, and before each classifier."""
    class AddOne(nn.Module):
        def forward(self, x):
            return x + 1

    block = rb.BranchDropout(AddOne())
    config = rb.Config(block_dropout=0.25, dropout=0.4)
    student = rb.RobustStudent(nn.Identity(), nn.Sequential(block), nn.Linear(64, 4), config)
    h = student.train().shared(torch.full((8, 64), 5.0))
    assert {round(value, 3) for value in (h - 5).flatten().tolist()} == {0.0, 1.333}
    for head in student.heads.values():
        assert not torch.equal(head(h), head(h))
    student.eval()
    assert torch.equal(student.shared(h), h + 1)
    assert torch.equal(student.heads["clean"](h), student.heads["clean"](h))

def test_docstring_example_runs():
    found = doctest.testmod(rb)
    assert found.attempted > 5
    assert found.failed == 0

@torch.no_grad()
def test_interpolation_with_the_original(tmp_path):
    """WiSE-FT."""
    student = differ(rb.RobustStudent(**own_modules()))
    rb.save(student, tmp_path / "robust.pt")
    for alpha in (0, 0.5):
        mixed = rb.load(tmp_path / "robust.pt", **own_modules(), alpha=alpha)
        for name in rb.HEADS:
            parts = []
            for model in (mixed, student):
                parts.append([*model.shared.parameters(), *model.heads[name].parameters()])
            for found, tuned, original in zip(*parts, student.original.parameters()):
                expected = alpha * tuned + (1 - alpha) * original
                assert torch.allclose(found, expected, atol=1e-6)

# --- CLIP: zero-shot and visually encoded ---------------------------------------------------------

def plain_clip():
    """The CLIP whose weights load_network draws from its seed."""
    with rb.own_randomness(0):
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
    """Its rows stay of length 1; neither they nor biases and norms decay."""
    student = clip_student(trained, lr=1e-2, weight_decay=0.3)
    before = copy.deepcopy(student.heads["combined"].state_dict())
    step_on(student, clip_network(True), (images_of(3), torch.arange(3), torch.arange(3) < 2))
    after = student.heads["combined"].state_dict()
    for name in after:
        moves = "scale" not in name and (trained or "classifier" not in name)
        assert torch.equal(after[name], before[name]) != moves, name
    lengths = after["classifier.weight"].norm(dim=-1)
    assert torch.allclose(lengths, torch.ones(3), atol=1e-6)
    decayed, spared = rb.make_optimizer(student, student.config).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0)
    names = {p: name for name, p in student.named_parameters()}
    assert all(p.ndim > 1 and "classifier" not in names[p] for p in decayed["params"])
    assert all(p.ndim == 1 or "classifier" in names[p] for p in spared["params"])

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
    rb.set_classes(again, names[:2], embed(names[:2]), 7.0)
    assert [head.classifier.scale.item() for head in again.heads.values()] == [7, 7, 7]
    rb.save(clip_student(trained=True), tmp_path / "ve.pt")
    with pytest.raises(rb.Refusal, match="zero-shot"):
        rb.load(tmp_path / "ve.pt", class_names=names)

@torch.no_grad()
def test_quick_gelu_follows_the_tag(monkeypatch):
    """OpenAI's weights need QuickGELU, though the plain name of the architecture says GELU."""
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
    (list("abcd"), list("abcd"), True), (list("abcd"), list("badc"), False),
    (None, list("abcd"), False), (WNIDS, WNIDS, True)])
def test_classifier_is_kept_for_its_own_classes_alone(known, names, is_kept, tmp_path):
    network = make_network()
    network.class_names = known
    network.is_random = False
    if known is WNIDS:  # as a file of plain weights with a thousand outputs has
        torch.save(timm.create_model("resnet18", **NARROW).state_dict(), tmp_path / "plain.pth")
        network = rb.load_network(f"resnet18:{tmp_path}/plain.pth", model_args=NARROW)
    before = network.classifier
    needs_probe = rb.give_classifier(network, names, rb.Config(device="cpu"))
    assert (network.classifier is before) == is_kept
    assert needs_probe != is_kept
    assert len(network.classifier.weight) == len(names)

@pytest.mark.parametrize("zero_shot", [False, True])
def test_clip_classifier_starts_at_the_text_embeddings(zero_shot):
    """VE probes and tunes it, ZS does neither."""
    network = rb.load_network("test-vit", "none")
    network.is_random = False
    config = rb.Config(device="cpu", zero_shot=zero_shot)
    assert rb.give_classifier(network, ["ant", "bee"], config) != zero_shot
    assert torch.allclose(network.classifier.weight, embed(["ant", "bee"]), atol=1e-6)
    assert bool([*network.classifier.parameters()]) != zero_shot

@torch.no_grad()
def test_a_plain_state_dict_is_taken(tmp_path):
    """Of a teacher with two classes, as people publish such files, and the generator outside goes
    on as it was."""
    net = randomise(timm.create_model("resnet18", num_classes=2))
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "plain.pth")
    before = torch.get_rng_state()
    config = rb.Config(teacher=f"resnet18:{tmp_path}/plain.pth", device="cpu")
    teacher = rb.load_teacher(config, ["ant", "bee"])
    assert torch.equal(torch.get_rng_state(), before)
    x = images_of(2, 224)
    normalised = v2.functional.normalize(x, rb.IMAGENET_MEAN, rb.IMAGENET_STD)
    assert torch.allclose(teacher(x), net(normalised), atol=1e-4)
    with pytest.raises(rb.Refusal, match="2 outputs"):
        rb.load_teacher(config, ["ant", "bee", "cow"])
    headless = {name: value for name, value in net.state_dict().items() if "fc" not in name}
    torch.save(headless, tmp_path / "headless.pth")
    network = rb.load_network(f"resnet18:{tmp_path}/headless.pth")
    assert network.classifier is None
    assert torch.allclose(network.features(x), teacher.features(x))

def test_size_of_a_vit_follows_its_arguments():
    for flags in ({"image_size": 48}, {"model_args": {"img_size": 48}}):
        flags["model_args"] = {**VIT, **flags.get("model_args", {})}
        assert rb.load_network("deit_tiny_patch16_224", "none", **flags).size == 48

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

@pytest.mark.parametrize("case", ["three-heads", "make-teacher", "zero-shot"])
def test_everything_is_on_the_gpu(case, monkeypatch):
    """Fake tensors compute devices alone, and raise where two are mixed."""
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", copy_fake)
    monkeypatch.setattr(nn.Module, "to", move_fakes)
    with FakeTensorMode(), MasksSelectTwo():
        network = rb.load_network("resnet18", "none", 32, {**NARROW, "num_classes": 2})
        teacher = rb.load_network("resnet18", "none", 32, {**NARROW, "num_classes": 2})
        if case == "zero-shot":
            network = rb.load_network("test-vit", "none")
            embeddings = network.text_embeddings(["ant", "bee"], device="cuda")
            network.classifier = rb.CosineClassifier(*embeddings, trained=False)
        student = rb.assemble(network, rb.Config(zero_shot=case == "zero-shot")).to("cuda").train()
        pixels = torch.rand(4, 3, 32, 32, device="cuda")
        labels = torch.zeros(4, dtype=torch.long, device="cuda")
        if case == "make-teacher":
            loss = rb.teacher_loss(student, 12.0, torch.stack([pixels] * 3, dim=1), labels)
        else:
            with pytest.raises(RuntimeError, match="device"):  # the teacher is on the CPU
                rb.student_loss(student, teacher, pixels, labels, labels == 0)
            loss = rb.student_loss(student, teacher.to("cuda"), pixels, labels, labels == 0)
        if case == "zero-shot":
            names = ["dog", "elk", "fox"]
            rb.set_classes(student, names, *student.text_embeddings(names, device="cuda"))
        found = student.eval().predict(pixels)
        original = student.original_probabilities(student.backbone(pixels))
        half = rb.interpolated(student, 0.5)(pixels)
        for tensor in (loss, original, half, found.probabilities, found.head, found.uncertainty):
            assert tensor.device.type == "cuda"

# --- Data: views ----------------------------------------------------------------------------------

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
        pixels = [batch[0] for batch in rb.batches(views, iter(keys), 5, workers)]
        found.append(torch.cat(pixels))
    assert torch.equal(found[0], found[1])
    for place in reversed(range(24)):  # one by one, in another order
        assert torch.equal(views[keys[place]][0], found[0][place])
    other_seed = torch.stack([views_of(samples, seed=4)[key][0] for key in keys[:12]])
    for another in (found[0][12:], other_seed):
        assert sum(torch.equal(a, b) for a, b in zip(another, found[0])) < 6

def test_views_compute_on_one_thread_and_seed_no_one_else(samples, monkeypatch):
    """Not the generator outside, not a GPU."""
    noisy = []

    def noise2net(image):
        assert torch.get_num_threads() == 1
        noisy.append(image)
        return image

    monkeypatch.setattr(rb, "noise2net", noise2net)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", pytest.fail)
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    for index in range(12):
        views_of(samples)[0, index]
    assert torch.get_num_threads() == 2
    assert 0 < len(noisy) < 12
    torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), state)

def test_coin_is_fair_and_clean_views_are_clean(samples):
    views = views_of(samples)
    plain = rb.TrainingViews(samples, 32, "none", rb.Config())
    assert views.augmix.all_ops is False  # or it would train on ImageNet-C's corruptions
    clean = 0
    changed = 0
    for key in [(epoch, index) for epoch in range(20) for index in range(12)]:
        pixels, _, is_clean = views[key]
        expected, _, is_called_clean = plain[key]
        assert is_called_clean  # nothing is augmented, nothing is called so
        same = torch.equal(pixels, expected)
        assert same or not is_clean
        clean += is_clean
        changed += not same
    assert 89 <= clean <= 151  # of 240; four standard deviations
    assert changed > 60

def test_noise2net_has_its_published_strength():
    """RMS change over twenty smooth images: 0.20 published, 0.09 without its last norm."""
    coarse = torch.rand(20, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1)
    torch.manual_seed(0)
    changed = torch.stack([rb.noise2net(image) for image in images])
    strength = (changed - images).square().mean((1, 2, 3)).sqrt()
    assert strength.mean().item() == pytest.approx(0.20, abs=0.03)

def test_images_of_odd_modes_are_read(tmp_path):
    """16-bit grey of level 60, not turned by its EXIF; a single pixel."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for width, height in ((50, 40), (1, 1)):
        image = Image.fromarray(np.full((height, width), 60 * 256 + 99, np.uint16))
        image.save(tmp_path / "deep.png", exif=turned)
        assert torch.equal(rb.read_image(tmp_path / "deep.png"), torch.full((3, height, width), 60))
        assert views_of([(tmp_path / "deep.png", 0)])[0, 0][0].shape == (3, 32, 32)
    for kind in (np.int32, np.float32):  # of unknown range
        Image.fromarray(np.full((8, 8), 60, kind)).save(tmp_path / "deep.tiff")
        with pytest.raises(rb.Refusal, match="deep.tiff"):
            rb.read_image(tmp_path / "deep.tiff")

@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_refused_by_name(workers, trained, tmp_path, capfd):
    data = make_folder(tmp_path / "data")
    path = data / "train/bee/3.png"
    path.write_bytes(path.read_bytes()[:300])
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
    assert (loaded.config, loaded.class_names) == (config, list("abcd"))

@pytest.mark.parametrize("part, name", [("backbone", "1.running_mean"), ("head", "3.weight")])
def test_another_network_is_refused(part, name, tmp_path):
    rb.save(rb.RobustStudent(**own_modules()), tmp_path / "robust.pt")
    changed = own_modules()
    changed[part].state_dict()[name][0] += 1e-3
    with pytest.raises(rb.Refusal, match="fingerprint"):
        rb.load(tmp_path / "robust.pt", **changed)
    with pytest.raises(rb.Refusal, match="together"):
        rb.load(tmp_path / "robust.pt", changed["backbone"])

class Evil(str):
    """Unpickling it makes the folder of this name."""

    def __reduce__(self):
        return os.mkdir, (str(self),)

def test_code_in_a_file_does_not_run(tmp_path):
    path = tmp_path / "robust.pt"
    for zipped in (True, False):
        torch.save({"tuned": Evil(tmp_path / "trap")}, path, _use_new_zipfile_serialization=zipped)
        for load in (rb.load, rb.load_network):
            with pytest.raises(rb.Refusal, match="robust.pt"):
                load(str(path))
        with pytest.raises(rb.Refusal, match="robust.pt"):
            rb.load_network(f"resnet18:{path}")
    assert not (tmp_path / "trap").exists()

def mutate(trained, kind, keys, value, path):
    """Load a plug-in or a network, its checksum right, in which one thing is another."""
    source = trained / ("robust.pt" if kind == "plug-in" else "teacher.pt")
    part = content = rb.read_checkpoint(source, kind)
    *parents, last = keys.split("/")
    for key in parents:
        part = part[key]
    part[last] = value
    if value is MISSING:
        del part[last]
    rb.write_checkpoint(kind, content, path)
    return rb.load(path) if kind == "plug-in" else rb.load_network(str(path))

def test_a_plug_in_finds_its_network_beside_it(trained, tmp_path):
    """Where both were moved; without it the refusal names both files."""
    (tmp_path / "first").mkdir()
    student = shutil.copy(trained / "student.pt", tmp_path / "first")
    out = tmp_path / "first/robust.pt"
    assert rb.main(robustify(trained, out, "--student", student)) == 0
    expected = rb.load(out)(images_of(2))
    (tmp_path / "first").rename(tmp_path / "second")
    assert torch.equal(rb.load(tmp_path / "second/robust.pt")(images_of(2)), expected)
    (tmp_path / "second/student.pt").unlink()
    with pytest.raises(rb.Refusal, match="second/robust.pt: .*first/student.pt: no such file"):
        rb.load(tmp_path / "second/robust.pt")

@pytest.mark.parametrize("kind, part", [("plug-in", "source"), ("network", "architecture")])
@pytest.mark.parametrize("key, value", [
    ("pretrained_image_path", "evil.pt"), ("checkpoint_path", "evil.pt"), ("cache_dir", "."),
    ("pretrained_cfg_overlay", {"url": "http://localhost/evil"}), ("weights_only", False),
    ("act_layer", "http://localhost/evil")])
def test_a_file_loads_no_other(kind, part, key, value, trained, tmp_path, monkeypatch):
    attempt = Mock(side_effect=OSError("no network in tests"))
    monkeypatch.setattr(socket.socket, "connect", attempt)
    monkeypatch.setattr(socket, "getaddrinfo", attempt)
    monkeypatch.chdir(tmp_path)
    torch.save(Evil("trap"), "evil.pt")
    source = {"name": "resnet18", "image_size": 32, "model_args": {**NARROW, key: value}}
    with pytest.raises(rb.Refusal, match=key):
        mutate(trained, kind, part, source, "mutated.pt")
    assert not attempt.called
    assert not Path("trap").exists()

MISSING = object()
HEAD = "tuned/heads.clean.classifier.weight"
ZERO_HEADS = {"name": "deit_tiny_patch16_224", "model_args": {"num_heads": 0}}
MUTATIONS = [  # (kind of file, path to what is changed, what it becomes)
    ("plug-in", "tuned", {}), ("plug-in", HEAD, MISSING), ("plug-in", HEAD, torch.ones(2, 2)),
    ("plug-in", "tuned/wings", torch.ones(2)), ("plug-in", "config/wings", 2),
    ("plug-in", "config/recipe", "ours"), ("plug-in", "config/epochs", math.inf),
    ("plug-in", "config/passes", 7), ("plug-in", "source/name", "other.pt"),
    ("plug-in", "classifier/weight", torch.ones(3)),
    ("network", "state/stem.net.conv1.weight", MISSING),
    ("network", "architecture/image_size", "x"), ("network", "architecture/name", "swin_t"),
    ("network", "architecture/model_args/channels", [8, 8, 16, 17]),
    ("network", "architecture", ZERO_HEADS)]
for _key in ("tuned", "config", "source", "fingerprint"):
    MUTATIONS += [("plug-in", _key, MISSING), ("plug-in", _key, 7)]
for _key in ("state", "architecture"):
    MUTATIONS += [("network", _key, MISSING), ("network", _key, 7)]

@pytest.mark.parametrize("kind, keys, value", MUTATIONS)
def test_a_mutated_file_is_refused(kind, keys, value, trained, tmp_path):
    with pytest.raises(rb.Refusal):
        mutate(trained, kind, keys, value, tmp_path / "mutated.pt")

def test_damaged_bytes_are_refused_or_harmless(trained, tmp_path):
    """Flipped bits, and truncation anywhere."""
    path = tmp_path / "damaged.pt"
    whole = (trained / "robust.pt").read_bytes()
    expected = rb.load(trained / "robust.pt").state_dict()
    for place in range(0, len(whole), len(whole) // 30):
        path.write_bytes(whole[:place])
        with pytest.raises(rb.Refusal, match=str(path)):
            rb.load(path)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
        with contextlib.suppress(rb.Refusal):
            assert states_equal(rb.load(path).state_dict(), expected)

# --- Training -------------------------------------------------------------------------------------

def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "student.pt"
    rb.save(make_student(), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(errno.ENOSPC, "disk full")))
    with pytest.raises(rb.Refusal, match="student.pt.*disk full"):
        rb.save(differ(make_student()), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

@pytest.mark.parametrize("last, message", [
    (2, "epoch 1, step 2.*not written yet"), (3, "epoch 2, step 1.*stays as it was")])
def test_the_last_good_checkpoint_stays(last, message, samples, tmp_path):
    """Two steps an epoch; the second leaves an infinite weight, or the third a loss of NaN."""
    config = rb.Config(out=tmp_path / "out", device="cpu", workers=0, epochs=3, batch_size=6)
    student = make_student()
    steps = []
    written = []

    def loss_of(pixels, labels, is_clean):
        steps.append(len(pixels))
        if last == 2 and len(steps) == 2:
            next(student.heads["unclean"].parameters()).data.fill_(math.inf)
        loss = student.heads["clean"](student.shared(student.backbone(pixels))).mean()
        return loss * math.nan if len(steps) == 3 else loss

    def write():
        written.append(len(steps))
        (tmp_path / "out").touch()

    views = rb.TrainingViews(samples, 32, "none", config)
    with pytest.raises(rb.Refusal, match=message):
        rb.fit(student, loss_of, views, config, write)
    assert written == ([] if last == 2 else [2])

def test_seed_and_rank_reach_dropout(samples, monkeypatch, tmp_path):
    """Each step of each process has its own noise, whatever ran before."""
    seeds = []

    def training_step(student, *arguments):
        assert student.training
        seeds.append(torch.initial_seed())
        return 0.0

    monkeypatch.setattr(rb, "training_step", training_step)
    for seed, rank in ((0, 0), (1, 0), (0, 1), (0, 0)):
        monkeypatch.setattr(rb, "RANK", rank)
        config = rb.Config(seed=seed, out=tmp_path / "out", batch_size=4, epochs=1, device="cpu",
                           workers=0)
        student = make_student()
        rb.fit(student, None, rb.TrainingViews(samples, 32, "none", config), config, int)
        assert not student.training
    assert seeds[:3] == seeds[9:]
    assert len(set(seeds)) == 9  # three steps each

def test_processes_share_every_step_and_the_probe(samples, monkeypatch):
    config = rb.Config(batch_size=9, epochs=2, device="cpu", workers=0)
    monkeypatch.setattr(rb, "PROCESSES", 2)
    assert rb.count_steps(20, config) == (4, 2)  # steps of eight images
    probed = []
    keys = []
    for rank in (0, 1):
        monkeypatch.setattr(rb, "RANK", rank)
        keys += rb.training_keys(20, config, 0)
        for _, labels in rb.centre_batches(samples, 32, config, "features"):
            probed += labels.tolist()
    assert sorted(probed) == list(range(12))
    assert len(set(keys)) == 32
    orders = [[index for epoch, index in keys if epoch == e] for e in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])

def test_learning_rate():
    """Of 100 steps a fifth warms up; the cosine is at its half after 60."""
    config = rb.Config(lr=0.4)
    found = [rb.learning_rate(step, 100, config) for step in (0, 19, 20, 60, 99)]
    assert found == pytest.approx([0.02, 0.4, 0.4, 0.2, 0], abs=2e-4)

def test_training_learns(trained, tmp_path):
    """What is dark and what is bright: a teacher from random weights, then a student of that
    network for classes of other names, whose original takes a probe first."""
    teacher = tmp_path / "teacher.pt"
    assert rb.main([*make_teacher(trained, teacher), "--jsd=0", "--epochs=30"]) == 0
    data = make_folder(tmp_path / "data", ("cow", "dog"))
    flags = ["--student", str(teacher), "--data", str(data), "--recipe=apt"]
    assert rb.main(robustify(trained, tmp_path / "apt.pt", *flags)) == 0
    student = rb.load(tmp_path / "apt.pt")
    assert student.class_names == ["cow", "dog"]
    views = [*rb.CentreViews(rb.image_folder(data / "train")[0], 32)]
    pixels = torch.stack([image for image, _ in views]) / 255
    labels = torch.tensor([label for _, label in views])
    original = student.original_probabilities(student.backbone(pixels))
    for p in (rb.load_network(teacher)(pixels), original, student(pixels)):
        assert (p.argmax(-1) == labels).float().mean() > 0.9

@pytest.mark.parametrize("processes, word", [(2, "MASTER_ADDR"), (50, "processes")])
def test_processes_that_cannot_work(processes, word, trained, tmp_path, monkeypatch, capsys):
    """That know of no other, or are more than there are images, where a probe would come first."""
    monkeypatch.setattr(rb, "PROCESSES", processes)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    if processes == 50:
        monkeypatch.setattr(rb, "join_processes", Mock())
    flags = ["--data", str(make_folder(tmp_path / "data", ("cow", "dog"))), "--recipe=apt"]
    assert rb.main(robustify(trained, tmp_path / "out.pt", *flags)) == 2
    line, = capsys.readouterr().err.splitlines()
    assert word in line

# --- Real processes -------------------------------------------------------------------------------

def forked(arguments, rank=0, processes=1, port=0, pause=0.0):
    """A process that runs the command line as torchrun would, without importing torch again."""
    training_step = rb.training_step

    def slow_step(*step):
        time.sleep(pause)
        return training_step(*step)

    def run():
        rb.RANK = rank
        rb.PROCESSES = processes
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
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
    teacher = shutil.copy(trained / "teacher.pt", tmp_path / "moved.pt")
    assert rb.main([*arguments, "--save-every=2", f"--teacher={teacher}"]) == 0
    assert re.search("resume +after step [3-8] of 9", capsys.readouterr().out)
    assert not state.exists()
    tuned = rb.read_checkpoint(out, "plug-in")["tuned"]
    assert states_equal(tuned, rb.read_checkpoint(tmp_path / "whole.pt", "plug-in")["tuned"])

def test_a_run_that_ends_between_its_last_two_writes_goes_on(trained, tmp_path, monkeypatch):
    """The state is there, the plug-in is not."""
    arguments = robustify(trained, tmp_path / "out.pt", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(rb, "save", Mock(side_effect=rb.Refusal("disk full")))
        assert rb.main(arguments) == 2
    assert rb.main(arguments) == 0
    tuned = rb.read_checkpoint(tmp_path / "out.pt", "plug-in")["tuned"]
    assert states_equal(tuned, rb.read_checkpoint(trained / "robust.pt", "plug-in")["tuned"])
    monkeypatch.setattr(rb, "load_network", pytest.fail)  # that it is over is told at once
    assert rb.main(arguments) == 2

@pytest.mark.parametrize("case, images", [("three-heads", 8), ("make-teacher", 16)])
def test_two_processes_equal_one(case, images, trained, tmp_path):
    """Within 1e-5, without dropout. A network with batch norm that begins at random weights
    averages its statistics: those of its first norm are of all images."""
    flags = ["--dropout=0", "--block-dropout=0", "--rule=kl", "--lr=1e-3"]
    flags.append(f"--batch-size={images}")
    kind = "tuned" if case == "three-heads" else "state"
    commands = []
    for name in ("one.pt", "two.pt"):
        make = robustify if case == "three-heads" else make_teacher
        commands.append([*make(trained, tmp_path / name), *flags])
    assert rb.main(commands[0]) == 0
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    pair = [forked(commands[1], rank, 2, port) for rank in (0, 1)]
    for process in pair:
        process.join()
        assert process.exitcode == 0
    one = rb.read_checkpoint(tmp_path / "one.pt", "any")[kind]
    two = rb.read_checkpoint(tmp_path / "two.pt", "any")[kind]
    if case == "make-teacher":
        one = {"stem.net.bn1.running_mean": one["stem.net.bn1.running_mean"]}
        assert one["stem.net.bn1.running_mean"].any()
    for name, value in one.items():
        assert torch.allclose(two[name].float(), value.float(), atol=1e-5), name

# --- Corruptions ----------------------------------------------------------------------------------

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

@pytest.mark.parametrize("name", ev.CORRUPTIONS)
def test_corruption(name, frost, monkeypatch):
    """Each image by its own index and the seed, whatever batch it is in, and in what order. Few at
    a time are computed, since zoomed copies of a whole batch would take gigabytes."""
    spy = Mock(side_effect=ev.CORRUPTIONS[name])
    monkeypatch.setitem(ev.CORRUPTIONS, name, spy)
    images = photographs(19, 16) // 2  # dark: what adds light is not cut off
    found = ev.corrupt(images, name, 5, range(19), 1, frost)
    assert max(len(call.args[0]) for call in spy.call_args_list) <= 8
    assert found.dtype == torch.uint8
    assert torch.all((found != images).flatten(1).any(1))
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    mixed = ev.corrupt(images[order], name, 5, order.tolist(), 1, frost)
    assert torch.equal(mixed, found[order])
    for first, seed in ((50, 1), (0, 2)):
        other = ev.corrupt(images, name, 5, range(first, first + 19), seed, frost)
        assert torch.equal(other, found) == (name in DETERMINISTIC)

@pytest.mark.parametrize("name", ev.CORRUPTIONS)
@pytest.mark.parametrize("size", [1, 8, 60])
def test_corruption_of_any_size(name, size, tmp_path):
    """Also of images larger than the photos of frost."""
    small = write_frost(tmp_path, (20, 30))
    for severity in (1, 5):
        images = photographs(2, size)
        assert ev.corrupt(images, name, severity, range(2), 0, small).shape == images.shape

def test_frost_mixes_five_photos_by_its_weights(tmp_path):
    for number in range(1, 7):
        Image.new("RGB", (400, 300), (40 * number,) * 3).save(tmp_path / f"frost{number}.png")
    grey = torch.full((40, 3, 224, 224), 50).byte()
    found = ev.corrupt(grey, "frost", 2, range(40), 0, str(tmp_path))
    expected = [0.8 * 50 + 0.6 * 40 * number for number in range(1, 6)]
    assert found.unique().tolist() == expected  # never the sixth photo

@pytest.mark.parametrize("severity", [1, 5])
def test_brightness_and_saturate_are_hsv(severity):
    images = photographs(1)
    images[0, :, :4] = torch.arange(32).byte() * 8  # greys, from black on
    added = parameters_at_32("brightness", severity)["amount"]
    saturate = parameters_at_32("saturate", severity)
    bright = ev.corrupt(images, "brightness", severity, [0])[0]
    saturated = ev.corrupt(images, "saturate", severity, [0])[0]
    for row, column in np.ndindex(32, 32):
        h, s, v = colorsys.rgb_to_hsv(*(images[0, :, row, column] / 255).tolist())
        expected = 255 * np.array(colorsys.hsv_to_rgb(h, s, min(v + added, 1)))
        assert bright[:, row, column].numpy() == pytest.approx(expected, abs=1.001)
        s = min(s * saturate["factor"] + saturate["shift"], 1)
        expected = 255 * np.array(colorsys.hsv_to_rgb(h, s, v))
        assert saturated[:, row, column].numpy() == pytest.approx(expected, abs=1.001)

def test_jpeg_is_pillows():
    image = photographs(1)
    severe = parameters_at_32("jpeg_compression", 5)["quality"]
    compressed = ev.corrupt(image, "jpeg_compression", 5, [0])
    for found, quality in ((compressed, severe), (ev.jpeg(image, 85), 85)):
        file = io.BytesIO()
        pixels = image[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        assert np.array_equal(found[0].permute(1, 2, 0), Image.open(file))

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

def test_defocus_is_a_disk():
    image = photographs(1, 6)[0, 0] / 255
    found = ev.defocus_blur(image.expand(1, 3, -1, -1), None, radius=3, alias=0.01)[0, 1]
    padded = np.pad(image.numpy(), 3, "reflect")
    expected = np.zeros((6, 6))
    for down, right in np.ndindex(7, 7):
        if (down - 3)**2 + (right - 3)**2 <= 9:
            expected += padded[down:down + 6, right:right + 6] / 29
    assert found.numpy() == pytest.approx(expected, abs=1e-5)

@pytest.mark.parametrize("shift", [1, 3])
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
    "unnamed": partial(Reader, ["ant", "bee"], known=False),
    "unnamed three": partial(Reader, ["ant", "bee", "cow"], known=False),
    "clip": partial(Reader, [], known=False, reads_text=True),
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
    """(models, data, flags) -> (exit code, {column: {set: {predictor: accuracy}}} and "rows" of
    tables, printed text); a model is a name of MODELS, a set FOLDER[/CORRUPTION/SEVERITY]."""
    monkeypatch.setattr(ev, "load_network", lambda name, *_: MODELS[name]())
    monkeypatch.setattr(ev, "load", lambda name: MODELS[name.removesuffix(".pt")]())
    monkeypatch.setattr(ev, "read_checkpoint", lambda *_: {"format": "robustify plug-in"})

    def run(models, data, *flags):
        file = tmp_path / "out.json"
        file.unlink(missing_ok=True)
        code = ev.main([*EVAL, "--model", *models, "--data", *map(str, data), "--json", str(file),
                        *flags])
        found = {"rows": {}}
        if file.is_file():
            content = json.loads(file.read_text())
            for one in content["sets"]:
                name = one["folder"]
                if one["corruption"]:
                    name += f"/{one['corruption']}/{one['severity']}"
                for column, accuracy in one["accuracy"].items():
                    found.setdefault(column, {})[name] = accuracy
            for row in sum(content["tables"], []):
                found["rows"].setdefault(row[0], row[1])
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
    "four names": three_of(["ant", "bee", "cow", "dog"], OTHER),  # as many as "wnids" has
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
    """The images of a row of FOLDERS; ObjectNet also has its four files of mappings."""
    write_images(root, FOLDERS[kind])
    if kind == "objectnet":
        mappings = {
            "folder_to_objectnet_label.json":
                {"z_clock": "Alarm clock", "box": "Box", "banana": "Banana"},
            "objectnet_to_imagenet_1k.json":
                {"Alarm clock": "analog clock; digital clock", "Banana": "banana"},
            "pytorch_to_imagenet_2012_id.json": {"409": 1, "530": 2, "954": 0}}
        (root / "mappings").mkdir()
        for name, content in mappings.items():
            (root / "mappings" / name).write_text(json.dumps(content))
        lines = "banana \nanalog clock\ndigital clock\n"
        (root / "mappings/imagenet_to_label_2012_v2").write_text(lines)
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
    ("names", "zero-shot"): (TWO, TWO), ("names", "unnamed"): (TWO, TWO),
    ("wnids", "unnamed"): "lacks", ("numbers", "unnamed three"): "lacks",
    ("objectnet", "unnamed"): "lacks",
    ("objectnet", "imagenet"): (0.8, 0.4), ("objectnet", "wnids"): (0.8, 0.4),
    ("objectnet", "names"): "lacks", ("objectnet", "other 1000"): "lacks",
    ("objectnet", "clip"): (0.8, 0.4), ("objectnet", "zero-shot"): (0.8, 0.4),
    ("no wnids", "imagenet"): "lacks", ("no wnids", "clip"): "no word",
    ("one class", "clip"): "one class", ("one class", "zero-shot"): "one class",
    ("one class", "imagenet"): "one class"}

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
        assert ("names no classes" in text) == (model == "unnamed")
        accuracy = found[model]["set"]
        assert (accuracy["answer"], accuracy["of all"]) == pytest.approx(expected), model
        scored[file] = accuracy
    if scored:
        code, found, _ = evaluate(scored, [root])
        assert {file: found[file.removesuffix(".pt")]["set"] for file in scored} == scored

def test_zero_shot_is_a_function_of_model_folder_and_templates(evaluate, tmp_path, monkeypatch):
    """Folders before it leave no trace; each list of names meets the text tower once; a plug-in
    keeps its own embeddings unless --templates are given."""
    kinds = ("names", "four names", "wnids", "objectnet", "numbers")
    sets = [make_set(kind, tmp_path / kind) for kind in kinds]
    readers = []
    read_text = Reader.read_text

    def spy(self, names, templates, device):
        readers.append((len(names), len(templates)))
        return read_text(self, names, templates, device)

    monkeypatch.setattr(Reader, "read_text", spy)
    monkeypatch.setitem(MODELS, "p", partial(zero_shot_plug_in, ["ant", "bee"]))
    monkeypatch.setitem(MODELS, "c", MODELS["clip"])
    alone = {}
    for data in sets:
        found = evaluate(["p.pt", "c"], [data])[1]
        for column in ("p", "c", "original"):
            alone.setdefault(column, {}).update(found[column])
    for data in (sets, sets[::-1]):
        found = evaluate(["p.pt", "c"], data)[1]
        assert {column: found[column] for column in alone} == alone
    for model, flags, expected in (("c", [], [(2, 80), (4, 80), (1000, 80)]),
                                   ("p.pt", [], [(4, 80), (1000, 80)]),
                                   ("p.pt", ["--templates", "a {}."], [(2, 1), (4, 1), (1000, 1)])):
        readers.clear()
        evaluate([model], sets, *flags)
        assert readers == expected

# --- Layouts, views -------------------------------------------------------------------------------

def test_layouts_of_published_corruptions(evaluate, tmp_path):
    """A whole tree, partly in groups, one corruption, one severity. A corruption counts once,
    however many severities it has; validation corruptions never; what is missing is named."""
    whole = tmp_path / "in-c"
    for cell, wrong in (("fog/1", 0), ("fog/2", 0), ("fog/3", 1), ("blur/zoom_blur/1", 0),
                        ("speckle_noise/1", 1)):
        for i in (0, 1):
            image = written(FISH[(i + wrong) % 2], OTHER)
            write_images(whole / cell, {f"{FISH[i]}/0.png": image})
    (whole / "fog/4").mkdir()  # an empty folder of a stopped download
    _, found, text = evaluate(["imagenet"], [whole / "fog"])
    assert "missing: fog 4, fog 5" in text
    assert found["rows"]["mean of 1 corruptions"] == pytest.approx(2 / 3)
    _, found, _ = evaluate(["imagenet"], [whole / "fog/1"])
    assert found["imagenet"]["1/fog/1"]["answer"] == 1
    _, found, text = evaluate(["imagenet"], [whole])
    assert "snow 1, snow 2" in text
    rows = found["rows"]
    assert rows["speckle_noise"] == 0
    assert rows["mean of 2 corruptions"] == pytest.approx(5 / 6)
    assert rows["mean error"] == pytest.approx(1 / 6)
    assert "mCE" not in rows
    for flags, word in ((["--severity", "5"], "--severity"), (["--corrupt", "fog"], "already")):
        code, _, text = evaluate(["clip"], [whole], *flags)
        assert code == 2
        assert word in text

def test_mce_by_hand():
    """Independent sums over random results; only for ImageNet's 1000 classes under all fifteen."""
    rng = np.random.default_rng(0)
    key = ("m", "answer")
    folder = ev.Folder("in-c", "published", WNIDS, [], list(ev.FIFTEEN))
    clean = ev.Folder("val", "classes", WNIDS, [], held_out=True)
    clean.results = [(ev.TestSet([]), {key: rng.random(50) < 0.8})]
    clean_error = 1 - clean.results[0][1][key].mean()
    mean = dict.fromkeys(ev.FIFTEEN, 0.0)
    for name in [*ev.FIFTEEN, "spatter"]:
        for severity in (1, 2, 3, 4, 5):
            right = rng.random(50) < 0.8 - 0.05 * severity
            folder.results.append((ev.TestSet([], name, severity), {key: right}))
            if name in mean:
                mean[name] += (1 - right.mean()) / 5
    rows = dict(ev.errors(folder, [folder, clean], [key]))
    assert rows["mean error"] == pytest.approx(sum(mean.values()) / 15)
    assert rows["mCE"] == pytest.approx(sum(mean[n] / ev.ALEXNET[n] for n in mean) / 15)
    assert rows["relative mCE"] == pytest.approx(sum(
        (mean[n] - clean_error) / (ev.ALEXNET[n] - (1 - 0.56522)) for n in mean) / 15)
    assert "relative mCE" not in dict(ev.errors(folder, [folder], [key]))
    folder.classes = WNIDS[:999]
    assert list(dict(ev.errors(folder, [folder], [key]))) == ["mean error"]

def test_differences_and_shifts_by_hand():
    """Differences +1/2, +1, 0, 0 of four images. Shifts of 1/4 and 3/4; a val/ of all classes is
    none."""
    def right(*values):
        return np.array(values, bool)

    folder = ev.Folder("in-c", "published", WNIDS, [], ["fog", "snow"])
    one, two = ("a", "answer"), ("b", "answer")
    folder.results = [
        (ev.TestSet([], "fog", 1), {one: right(1, 1, 0, 0), two: right(0, 0, 0, 0)}),
        (ev.TestSet([], "snow", 1), {one: right(0, 1, 0, 0), two: right(0, 0, 0, 0)})]
    difference = np.array([0.5, 1, 0, 0])
    error = 200 * difference.std(ddof=1) / 2
    assert ev.paired(folder, ["fog", "snow"], "a", "b") == f"+37.5 +- {error:.1f}"
    folders = []
    for classes, values, held_out in ((WNIDS, (1, 1, 1, 1), True), (WNIDS, (1, 0, 0, 0), False),
                                      (WNIDS[:200], (1, 1, 1, 0), True)):
        folders.append(ev.Folder("x", "classes", classes, [], held_out=held_out))
        folders[-1].results = [(ev.TestSet([]), {one: right(*values)})]
    columns = [ev.Column("a", "network", None, WNIDS)]
    args = Mock(tables=[], average=False)
    ev.average_of_shifts(folders, columns, args)
    rows = dict(args.tables[0][1:])
    assert rows["average of shifts"] == 0.5
    ev.average_of_shifts(folders[1:2], columns, args)
    assert len(args.tables) == 1

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
        images[f"{folder}/{FISH[i % 2]}/{i}.png"] = pixels.astype(np.uint8)
    write_images(root, images)
    return root / folder.split("/")[0]

def test_pixels_do_not_depend_on_company(evaluate, tmp_path, monkeypatch):
    """Models of 64 and 224 px, on photos, on small squares, each clean and corrupted, and on
    published corruptions of several sizes. The first image decides nothing."""
    photos = noise(tmp_path, "photos", (1, 1), (75, 75), (300, 240), (240, 300), (500, 400))
    small = noise(tmp_path, "small", (9, 14), (32, 32), (32, 32), (32, 32))
    published = noise(tmp_path, "published/fog/1", (75, 75), (224, 224), (224, 224), (224, 224))
    cameras = {}
    names = ("64", "224")
    for name in names:
        monkeypatch.setitem(MODELS, name, partial(Camera, int(name), cameras))
    for data in (photos, small, published):
        flags = ["--severity", "1", "--corrupt", "pixelate"][:2 if data == published else 4]
        alone = {}
        for name in names:
            assert evaluate([name], [data], *flags)[0] == 0
            alone[name] = torch.cat(cameras[int(name)].seen)
        assert evaluate(names, [data], *flags)[0] == 0
        for name in names:
            assert torch.equal(torch.cat(cameras[int(name)].seen), alone[name])
        if data != photos:
            for i, path in enumerate(sorted(data.rglob("*.png"))[1:], 1):
                whole = torch.tensor(np.asarray(Image.open(path))).permute(2, 0, 1)[None] / 255
                assert torch.equal(alone["224"][i], F.interpolate(whole, (224, 224))[0])
        else:
            for i, path in enumerate(sorted(data.rglob("*.png"))):
                resized = v2.functional.resize(rb.read_image(path), 256)
                expected = v2.functional.center_crop(resized, 224) / 255
                assert torch.equal(alone["224"][i], expected)

def test_names_do_not_collide():
    assert ev.short_names("--data", ["x/val", "y/val/"]) == ["x/val", "y/val"]
    assert ev.short_names("--model", ["b/robust.pt", "resnet50"]) == ["robust", "resnet50"]

# --- Real networks --------------------------------------------------------------------------------

def make_plug_in(path, seed=0, **settings):
    """A plug-in of a narrow ResNet of random weights, as if tuned: its heads disagree."""
    network = rb.load_network("resnet18", "none", 32, {**NARROW, "num_classes": 2})
    randomise(network, seed).class_names = ["ant", "bee"]
    with torch.no_grad():  # a classifier that decides differently from image to image
        network.classifier.weight *= 10
        middle = network(images_of(40)).mean(0)
        network.classifier.bias -= middle
    file = path.with_name(f"student{seed}.pt")
    rb.save_network(network, file)
    config = rb.Config(student=str(file), dropout=0.3, **settings)
    rb.save(differ(rb.assemble(rb.load_network(str(file)), config), 0.5), path)

@pytest.fixture(scope="session")
def plug_ins(tmp_path_factory):
    """three.pt and apt.pt of student0.pt, other.pt of student1.pt; teacher.pt; data/."""
    root = tmp_path_factory.mktemp("plug_ins")
    make_plug_in(root / "three.pt", fraction=0.9, teacher=str(root / "teacher.pt"))
    make_plug_in(root / "apt.pt", recipe="apt", fraction=0.9, block_dropout=0.0)
    make_plug_in(root / "other.pt", seed=1, fraction=0.2)
    wide = {"channels": [24, 24, 24, 24], "layers": [1, 1, 1, 1], "num_classes": 2}
    teacher = rb.load_network("resnet18", "none", 32, wide)
    teacher.class_names = ["ant", "bee"]
    rb.save_network(teacher, root / "teacher.pt")
    for part in ("train", "val"):
        make_folder(root / "data", part=part, n=20)
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
    files = [plug_ins / "three.pt", plug_ins / "student1.pt"]
    accuracy = run(tmp_path, *flags, *files)["sets"][0]["accuracy"]
    pixels, labels = images_and_labels(plug_ins / "data/val")
    answers = []
    for alpha in (0.0, 0.5, 1.0):
        found = rb.load(plug_ins / "three.pt", alpha=alpha).predict(pixels)
        answers.append(found.probabilities)
        column = accuracy[f"three alpha {alpha:g}"]
        assert column["answer"] == share(answers[-1].argmax(-1) == labels)
        right = {head: phi.argmax(-1) == labels for head, phi in found.phi.items()}
        for head in rb.HEADS:
            assert column[head] == share(right[head])
        assert column["oracle"] == share(right["clean"] | right["unclean"])
        assert column["clean share"] == share(found.head == 0)
    answers.append(rb.load_network(str(plug_ins / "student1.pt"))(pixels).softmax(-1))
    assert accuracy["student1"]["answer"] == share(answers[-1].argmax(-1) == labels)
    assert accuracy["average"]["answer"] == share(sum(answers).argmax(-1) == labels)
    student = rb.load_network(str(plug_ins / "student0.pt"))
    assert accuracy["original"]["answer"] == share(student(pixels).argmax(-1) == labels)

def test_originals_and_shared_backbones(plug_ins):
    """One original for each fingerprint, whatever files are called; plug-ins of one student share
    its backbone, those of another cut do not."""
    shutil.copy(plug_ins / "student1.pt", plug_ins / "original.pt")
    names = ["three", "original", "apt", "other"]
    models = [str(plug_ins / f"{name}.pt") for name in names]
    columns = ev.load_columns(ev.parse([*EVAL, "--data", "x", "--model", *models]))
    folder = plug_ins.name
    assert [column.name for column in columns] == [
        f"original of {folder}/three", f"original of {folder}/other",
        *(f"{folder}/{name}" for name in names)]
    assert sorted(len(group) for group in ev.grouped(columns)) == [1, 2, 3]

def test_another_activation_is_another_network(plug_ins, tmp_path):
    """Weights alone do not tell GELU from QuickGELU."""
    network = rb.load_network(str(plug_ins / "student1.pt"))
    network.architecture["model_args"]["act_layer"] = "gelu"
    rb.save_network(network, tmp_path / "gelu.pt")
    network = rb.load_network(str(tmp_path / "gelu.pt"))
    rb.save(rb.assemble(network, rb.Config(fraction=0.2)), tmp_path / "twin.pt")
    models = [str(plug_ins / "other.pt"), str(tmp_path / "twin.pt")]
    columns = ev.load_columns(ev.parse([*EVAL, "--data", "x", "--model", *models]))
    assert [len(group) for group in ev.grouped(columns)] == [2, 2]

@pytest.mark.parametrize("error, code", [(rb.Refusal("broken"), 2), (KeyboardInterrupt, 130)])
def test_what_was_finished_stays(error, code, plug_ins, tmp_path, monkeypatch, capsys):
    """A broken image, Ctrl-C: the sets before are printed and written, marked as partial."""
    read = ev.read_image

    def read_image(path):
        if "fog/2" in path:
            raise error
        return read(path)

    monkeypatch.setattr(ev, "read_image", read_image)
    for severity in "12":
        shutil.copytree(plug_ins / "data/val", tmp_path / "c/fog" / severity)
    flags = ["--data", plug_ins / "data", tmp_path / "c", "--severity", 1, 2, "--model",
             plug_ins / "three.pt", "--json", tmp_path / "out.json"]
    assert ev.main([*EVAL, *map(str, flags)]) == code
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["partial"]
    assert len(found["sets"]) == 2
    assert "40 images (partial)" in capsys.readouterr().out

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

    hooks = []
    for module in nn.ModuleList(networks).modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            hooks.append(module.register_forward_hook(count))
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
    for k in (1, 10):
        expected = of_predict + (k - 10) * a_pass
        assert found[f"three-heads, K = {k}"] == pytest.approx(expected, rel=1e-3)
    apt = rb.load(plug_ins / "apt.pt")
    expected = multiplications(lambda: apt.predict(one), apt)
    assert found["apt, K = 10"] == pytest.approx(expected, rel=1e-3)
    expected = multiplications(lambda: teacher(one), teacher)
    assert found["teacher"] == pytest.approx(expected, rel=1e-3)
    is_clean = torch.tensor([True, False, True, False])
    for name in rb.RECIPES:
        config = rb.Config(**{**vars(student.config), "recipe": name})
        student = rb.assemble(network, config).train()
        expected = multiplications(lambda: rb.student_loss(
            student, teacher, four, torch.zeros(4).long(), is_clean), student, teacher) / 4
        step, = [value for row, value in found.items() if row.startswith(f"train {name},")]
        assert step == pytest.approx(expected, rel=1e-3)

@pytest.mark.parametrize("groups", [1, 2, 8])
def test_macs_of_a_convolution(groups):
    """Forward pass, gradient of the input and of the weight cost the same."""
    convolution = nn.Conv2d(8, 16, 3, padding=1, groups=groups)
    x = torch.rand(2, 8, 5, 5, requires_grad=True)
    forward = 2 * 16 * 5 * 5 * (8 // groups) * 9
    assert ev.count_macs(lambda: convolution(x)) * 1e9 == pytest.approx(forward)
    both = ev.count_macs(lambda: convolution(x).sum().backward()) * 1e9
    assert both == pytest.approx(3 * forward)

def test_transfer_features_are_where_tuning_acted(plug_ins, tmp_path):
    """Shared blocks, or what each head's classifier sees where nothing is shared; tokens of any
    kind are pooled."""
    table, *_ = run(tmp_path, "--transfer", plug_ins / "data", "--model", plug_ins / "three.pt",
                    plug_ins / "other.pt", plug_ins / "student1.pt")["tables"]
    assert [row[0] for row in table[1:]] == [
        "three, original", "three, tuned", "other, original", "other, clean head",
        "other, combined head", "other, unclean head", "student1, features"]
    assert table[1][1] > 0.9
    pixels, _ = images_and_labels(plug_ins / "data/val")
    for name, tuned in (("three", "tuned"), ("other", "clean head")):
        other = rb.load(plug_ins / f"{name}.pt")
        features = ev.features(ev.Column(name, "plug-in", other, None), pixels)
        assert not torch.allclose(features["original"], features[tuned])
    tokens = torch.rand(2, 5, 3)
    for class_token, expected in ((True, tokens[:, 0]), (False, tokens.mean(1))):
        other.class_token = class_token
        assert torch.equal(ev.pooled(other, tokens), expected)

def test_plot(plug_ins, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--corrupt", "contrast", "--severity", 1, 5, "--plot", tmp_path / "plot.png"]
    run(tmp_path, "--data", plug_ins / "data", "--model", plug_ins / "three.pt", *flags)
    assert min(Image.open(tmp_path / "plot.png").size) > 300

def test_pretrained_is_for_names_alone(monkeypatch):
    """NAME:FILE brings its own weights."""
    asked = []

    def load_network(name, pretrained):
        asked.append((name, pretrained))
        return MODELS["names"]()

    monkeypatch.setattr(ev, "load_network", load_network)
    models = ["resnet18", "resnet18:w.pth"]
    ev.load_columns(ev.parse(["--data=x", "--pretrained=none", "--device=cpu", "--model", *models]))
    assert asked == [("resnet18", "none"), ("resnet18:w.pth", "")]

def test_an_interrupted_run_is_named(plug_ins, tmp_path, capsys):
    shutil.copy(plug_ins / "three.pt", tmp_path)
    for interrupted in (False, True):
        capsys.readouterr()
        run(tmp_path, "--data", plug_ins / "data", "--model", tmp_path / "three.pt")
        assert ("three.pt.state is there" in capsys.readouterr().out) == interrupted
        (tmp_path / "three.pt.state").touch()

def test_average_is_among_the_classes_of_the_folder():
    """A network with other outputs too has as much weight as one with these alone."""
    groups = []
    for p in ([0.08, 0.02, 0.9], [0.4, 0.6]):
        model = Mock(size=32, return_value=torch.tensor([p]).log())
        column = ev.Column(f"{len(p)} outputs", "network", model, None)
        column.outputs = torch.tensor([[0], [1]])
        groups.append([column])
    images = {32: torch.zeros(1, 3, 32, 32)}
    right = ev.judge(groups, images, torch.tensor([0]), Mock(device="cpu", average=True))
    assert right["average", "answer"].tolist() == [True]

@torch.no_grad()
def test_clip_columns(plug_ins, tmp_path):
    """Bare CLIP, a plug-in of --zero-shot and its original, on its classes and on new ones."""
    images, labels = images_and_labels(plug_ins / "data/val")
    for old, name in (("ant", "elk"), ("bee", "fox")):
        shutil.copytree(plug_ins / "data/val" / old, tmp_path / "new" / name)
    network = clip_network(trained=False)
    student = rb.assemble(network, rb.Config(student="test-vit", pretrained="none", zero_shot=True))
    rb.save(differ(student), tmp_path / "zs.pt")
    found = run(tmp_path, "--data", plug_ins / "data", tmp_path / "new", "--pretrained", "none",
                "--model", "test-vit", tmp_path / "zs.pt")
    for one, names in zip(found["sets"], (["ant", "bee"], ["elk", "fox"])):
        for model in (network, student):
            rb.set_classes(model, names, *network.text_embeddings(names))
        right = {"test-vit": network(images), "original": network(images), "zs": student(images)}
        for column, outputs in right.items():
            assert one["accuracy"][column]["answer"] == share(outputs.argmax(-1) == labels)

def test_each_image_counts_once_under_torchrun(plug_ins, tmp_path):
    """Three processes for 40 images; the shares differ in size."""
    flags = ["--data", plug_ins / "data", "--corrupt", "shot_noise", "--severity", 3, "--rule", "u",
             "kl", "--passes", 2, 5, "--model", plug_ins / "three.pt"]
    one = run(tmp_path, *flags)["sets"]
    file = tmp_path / "three.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 3,
               "eval.py", *EVAL, *flags, "--json", file]
    subprocess.run([*map(str, command)], cwd=Path(__file__).parent, check=True)
    three = json.loads(file.read_text())["sets"]
    assert one == three
    assert [s["n"] for s in one] == [40, 40]

# --- Command lines and refusals -------------------------------------------------------------------

NEW_VIT = ["--student=deit_tiny_patch16_224", "--pretrained=none"]

@pytest.mark.parametrize("flags, part", [  # @ is the test's folder, $ that of `trained`
    (["--data=@/nowhere"], "nowhere"), (["--data=@/hollow"], "cow"),
    (["--data=@/long"], "not classes"), (["--data=@/other"], "teacher.pt"),
    (["--data=@/long/training"], "one class"), (["--zero-shot", "--recipe=lp"], "--recipe lp"),
    (["--teacher=@/no.pt"], "--make-teacher"), (["--teacher=$/robust.pt"], "robust.pt"),
    (["--student=my_net"], "my_net"), (["--student=swin_t", "--pretrained=none"], "Swin"),
    (["--student=resnet18", "--pretrained=tag"], "tag"), (["--image-size=64"], "--image-size"),
    (["--student=resnet18:@/long/training/bee/0.png"], "0.png"), (["--wings"], "--wings"),
    (["--student=resnet18:@/w.pth", "--pretrained=tag"], "own weights"), (["--jsd=12"], "--jsd"),
    (["--model-args={wings"], "--model-args"), ([*NEW_VIT, '--model-args={"wings": 2}'], "wings"),
    (["--recipe=ours"], "three-heads"), (["--epochs=0"], "--epochs"), (["--lr=nan"], "--lr"),
    (["--limit=1"], "--limit"),
    (["--zero-shot"], "text"), (["--augment=none"], "--augment"), (["--device=cuda"], "cuda"),
    (["--make-teacher=resnet18"], "no --student"), (["--out=@"], "--out"),
    (["--student=", "--teacher=", "--make-teacher=resnet18", "--recipe=lp"], "or --recipe"),
    (["--student=", "--teacher=", "--zero-shot", "--make-teacher=resnet18"], "classifier")])
def test_refusals_are_one_line(flags, part, trained, tmp_path, capsys):
    (tmp_path / "hollow/train/cow").mkdir(parents=True)  # a class without images
    for root, second, folder in (("hollow", "ant", "train"), ("other", "cow", "train"),
                                 ("other", "dog", "train"),
                                 ("long", "bee", "training"), ("long", "bee", "validation")):
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

@pytest.mark.parametrize("flags, fragment", [  # @ is the test's folder; later flags win
    (["--data", "@/nowhere"], "nowhere"), (["--data", "@/cows"], "cow"),
    (["--data", "@/levels"], "without severities"), (["--data", "@/objectnet"], "mappings"),
    (["--model", "no.pt"], "no.pt"), (["--model", "@/student.pt", "@/./student.pt"], "same"),
    (["--corrupt", "rain"], "rain"), (["--corrupt", "frost"], "--frost"),
    (["--frost", "@/cows"], "frost"), (["--severity", "6"], "--severity"), (["--wings"], "--wings"),
    (["--device", "cuda"], "cuda"), (["--templates", "photo"], "--templates"),
    (["--passes", "0"], "--passes"), (["--json", "@"], "in a folder"),
    (["--plot", "@/out.png"], "--corrupt"), (["--cost", "--model", "@/student.pt"], "--cost"),
    (["--cost", "--model", "@/orphan.pt"], "gone.pt"), (["--transfer", "@/data"], "train")])
def test_refusals_come_before_the_first_image(flags, fragment, plug_ins, tmp_path, monkeypatch,
                                              capsys):
    """One line on stderr, exit code 2, nothing read and nothing written."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    write_images(tmp_path, {f"{path}/0.png": pixels for path in (
        "cows/ant", "cows/cow", "data/val/ant", "data/val/bee", "objectnet/images/ant",
        "levels/fog/ant", "levels/snow/ant")})
    (tmp_path / "objectnet/mappings").mkdir()
    for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json",
                 "pytorch_to_imagenet_2012_id.json", "imagenet_to_label_2012_v2"):
        (tmp_path / "objectnet/mappings" / name).write_text('{"ant": ["Ant"]}')
    (tmp_path / "student.pt").write_bytes((plug_ins / "student0.pt").read_bytes())
    config = rb.Config(student=str(tmp_path / "student.pt"), teacher=str(tmp_path / "gone.pt"))
    rb.save(rb.assemble(rb.load_network(config.student), config), tmp_path / "orphan.pt")
    monkeypatch.setattr(ev, "read_image", None)
    before = set(tmp_path.rglob("*"))
    given = ["--data", "@/data", "--model", "@/student.pt", "--json", "@/out.json", *flags]
    assert ev.main([*EVAL, *[flag.replace("@", str(tmp_path)) for flag in given]]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("eval.py: ")
    assert fragment in line
    assert set(tmp_path.rglob("*")) == before
