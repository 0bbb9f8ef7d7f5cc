"""Tests of robustify.py and eval.py, each against an independent oracle; no downloads, no GPU."""

import colorsys
import copy
import doctest
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: equal to the bit is a promise of one device
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch.distributions import Categorical, kl_divergence

import eval as ev
import robustify as rb

MEAN = torch.tensor([0.4, 0.5, 0.6])[:, None, None]
STD = torch.tensor([0.2, 0.25, 0.3])[:, None, None]
WNIDS = timm.data.ImageNetInfo().label_names()
FISH = WNIDS[:4]
NARROW = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}  # a resnet18 of 0.02 M
TINY = {"patch_size": 16, "depth": 3, "embed_dim": 48, "num_heads": 3}
FLAGS = ["--workers=0", "--epochs=1", "--batch-size=8", "--lr=1e-2"]

def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def close(found, expected, atol=1e-6):
    return torch.allclose(found, expected, atol=atol)

def randomise(module, seed=0):
    """Random parameters and batch-norm statistics. A fresh network hides wrong wiring: its norms
    are the identity, and its layer scales are tiny."""
    for i, p in enumerate(module.parameters()):
        p.data = noise(*p.shape, seed=1000 * seed + i) * (len(p) / p.numel()) ** 0.5
        if p.ndim < 2:
            p.data = 1 + p / 2
    for i, (name, buffer) in enumerate(module.named_buffers()):
        if "running" in name:  # mean, var
            buffer.copy_(noise(*buffer.shape, seed=i).sigmoid() - 0.5 + ("var" in name))
    return module.eval().requires_grad_(True)

def images_of(n, size=32):
    """Pixels in [0, 1], each image with its own colour."""
    return (0.7 * noise(n, 3, 1, 1) + 0.3 * noise(n, 3, size, size, seed=1)).sigmoid()

def write_images(root, images):
    """{path: array} as PNG files."""
    for path, image in images.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / path, "PNG")
    return root

def make_folder(root, classes=("ant", "bee"), n=8):
    """train/CLASS/i.png, dark or bright by class, so that there is something to learn."""
    rng = np.random.default_rng(0)
    for name, i in product(classes, range(n)):
        pixels = rng.integers(0, 128, (32, 32, 3)) + 100 * (name == classes[-1])
        write_images(root, {f"train/{name}/{i}.png": pixels.astype(np.uint8)})
    return root

def images_and_labels(root):
    """All of a folder of class folders: pixels (n, 3, 32, 32), labels (n,)."""
    images = rb.ImageClasses(root)
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in images]
    return torch.stack(pixels) / 255, torch.tensor([label for _, label in images])

def networks(net, size, seed=0):
    """(our Network, the library's), of the same random weights."""
    bare = copy.deepcopy(randomise(net, seed))
    classifier = bare.get_classifier()
    bare.reset_classifier(0)
    mean, std = MEAN.flatten().tolist(), STD.flatten().tolist()
    return rb.Network("tiny", bare, classifier, size, mean, std), net

def make_network(seed=0):
    """A narrow ResNet of four blocks and four classes."""
    return networks(timm.create_model("resnet18", num_classes=4, **NARROW), 32, seed)[0]

def make_vit():
    net = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32, **TINY)
    return networks(net, 32)[0]

def make_student(recipe="three-heads", **settings):
    """Of the narrow ResNet, two blocks frozen and one shared; vpt takes a ViT."""
    network = make_vit() if recipe == "vpt" else make_network()
    return rb.cut(network, rb.Config(recipe=recipe, fraction=0.35, **settings))

@torch.no_grad()
def differ(student, amount=0.3):
    """Make the heads disagree, and the shared part another, as tuning would."""
    for i, p in enumerate(student.parameters()):
        if p.requires_grad:
            p += amount * p.abs().mean() * noise(*p.shape, seed=i)
    return student

def own_modules(inplace=False):
    """Backbone, shared part and head of a user's own."""
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8))
    shared = nn.Sequential(nn.SiLU(inplace), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    head = nn.Sequential(nn.SiLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return [randomise(module) for module in (backbone, shared, head)]

def states_equal(one, other):
    """Whether two dictionaries of tensors agree to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)

class Examples(torch.utils.data.TensorDataset):
    """Eight images by hand in place of TrainingViews, half of them clean."""
    augment, classes = "hand", list("abcd")

    def __init__(self):
        super().__init__((255 * images_of(8)).byte(), torch.arange(8) % 3, torch.arange(8) < 4)

def command(run, arguments, **changed):
    """Run a command line of robustify.py or eval.py -> exit code."""
    with mock.patch.object(sys, "argv", [f"{run.__module__}.py"] + [str(a) for a in arguments]):
        return rb.main(run)

def robustify(folder, out):
    """Arguments that tune the student of a folder like `trained`."""
    return ["--student", folder / "student.pt", "--teacher", folder / "teacher.pt",
            "--data", folder / "data", "--out", out] + FLAGS

def make_teacher(folder, out, name="test_convnext:none"):
    return ["--make-teacher", name, "--image-size=32", "--data", folder / "data",
            "--out", out] + FLAGS

@pytest.fixture(scope="session", autouse=True)
def clips(tmp_path_factory):
    """Two tiny CLIPs that open_clip knows by name."""
    folder = tmp_path_factory.mktemp("clips")
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    towers = {"test-vit": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 16},
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
    assert command(rb.run, make_teacher(root, root / "teacher.pt")) == 0
    assert command(rb.run, make_teacher(root, root / "student.pt", "test_vit:none")) == 0
    assert command(rb.run, robustify(root, root / "robust.pt")) == 0
    return root

# --- The split equals the library's whole network -------------------------------------------------

TIMM = {  # name: (name of timm, size, arguments)
    "ViT": ("vit_tiny_patch16_224", 32, TINY),
    "mean": ("vit_tiny_patch16_224", 32, {**TINY, "global_pool": "avg", "class_token": False}),
    "attention pool": ("vit_base_patch16_siglip_224", 32, TINY),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", 28, {**TINY, "patch_size": 14}),
    "ResNet": ("resnet18", 32, NARROW), "EfficientNet": ("test_efficientnet", 64, {})}

def family(name):
    """(our Network, the library's network with a classifier), of the same random weights."""
    if name in TIMM:
        library_name, size, arguments = TIMM[name]
        if "patch" in library_name:
            arguments = {**arguments, "img_size": size}
        return networks(timm.create_model(library_name, num_classes=5, **arguments), size)
    tower = open_clip.create_model(name).visual
    classifier = rb.CosineClassifier(noise(5, 32), 5.0, trained=True)  # a CLIP tower has none
    tower.get_classifier = mock.Mock(return_value=classifier)
    tower.reset_classifier = mock.Mock()
    network, net = networks(tower, int(np.max(tower.image_size)))
    return network, nn.Sequential(net, network.classifier)

@pytest.mark.parametrize("name", [*TIMM, "test-vit", "test-rn"])
@torch.no_grad()
def test_split_equals_whole(name):
    """To the bit, but for a CLIP ViT, whose last block computes the class token alone."""
    network, net = family(name)
    x = images_of(4, network.size + 16)
    small = F.interpolate(x, (network.size, network.size), mode="bicubic", antialias=True)
    expected = net((small - MEAN) / STD)
    assert expected.std(0).min() > 1e-3  # the images differ
    assert rb.count_parameters(network) == rb.count_parameters(net)
    student = rb.cut(network, rb.Config(fraction=0.3))
    z = student.backbone(x)
    found = [head(student.shared(z)) for head in student.heads.values()]
    for logits in found + [network(x), student.original_top(z)]:
        assert close(logits, expected)
        assert torch.equal(logits, expected) or name == "test-vit"

@pytest.mark.parametrize("fraction, head_blocks", [(0.05, 1), (0.2, 0), (0.2, 2), (0.6, 1)])
def test_cut_is_the_best(fraction, head_blocks):
    """Against a brute-force count by parameter name."""
    network = make_vit()
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    choices = [sum(sizes.values())]
    frozen = ("net.cls_token", "net.pos_embed", "net.patch_embed.")
    for first in range(3 - head_blocks + 1):
        choices.append(sum(n for name, n in sizes.items() if not name.startswith(frozen)))
        frozen += (f"net.blocks.{first}.",)
    config = rb.Config(fraction=fraction, head_blocks=head_blocks, recipe="apt")
    student = rb.cut(network, config)
    tuned = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert tuned == min(choices, key=lambda n: abs(n / choices[0] - fraction))
    assert len(student.heads["combined"].body) == head_blocks + 1  # and the pool

# --- Gradients and loss ---------------------------------------------------------------------------

def fit(model, loss_of, out, write=None, **settings):
    """Train on the Examples as robustify.py does."""
    def touch(path, **progress):
        Path(path).touch()

    config = rb.Config(lr=1e-2, weight_decay=0.3, workers=0, out=str(out), **settings)
    rb.fit(model, loss_of, Examples(), config, write or touch)

@pytest.mark.parametrize("recipe", ["three-heads", "ft", "lp", "vpt", "VE", "ZS"])
def test_training_leaves_the_frozen_alone(recipe, tmp_path):
    """What is tuned moves; batch-norm statistics never do, a CLIP's classifier in VE alone: its
    rows stay of length 1, and neither they nor biases and norms decay."""
    is_clip = recipe in ("VE", "ZS")
    student = clip_student(recipe == "VE") if is_clip else make_student(recipe)
    before = copy.deepcopy(student.state_dict())
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, student.classes))
    fit(student, partial(rb.student_loss, student, teacher), tmp_path / "out.pt", epochs=1)
    moved = {name for name, v in student.state_dict().items() if not torch.equal(v, before[name])}
    tuned = {name for name, p in student.named_parameters() if "backbone" not in name}
    tuned = {name for name in tuned if "original_top" not in name}
    if recipe == "vpt":
        tuned = {name for name in tuned if "prompts" in name or "classifier" in name}
    assert moved == tuned
    assert any("classifier" in name for name in moved) == (recipe != "ZS")
    counts = {"ft": rb.count_parameters(make_network()), "lp": 68, "vpt": 3 * 10 * 48 + 196}
    count = sum(before[name].numel() for name in moved)
    assert count == counts.get(recipe, count)
    rows = [head.classifier.weight for head in student.heads.values() if is_clip]
    assert all(close(row.norm(dim=-1), torch.ones(3)) for row in rows)
    student.config.weight_decay = 0.3
    for group in rb.make_optimizer(student, student.config).param_groups:
        decays = {p.ndim > 1 and all(p is not row for row in rows) for p in group["params"]}
        assert decays == {group["weight_decay"] == 0.3}

TAUGHT_BY = {"three-heads": ("original", "robust"), "combined-head": ("original", "robust"),
             "single-teacher": ("robust", "robust")}  # clean examples, augmented ones

def slow_loss(student, teacher, pixels, labels, is_clean):
    """Eqs. 3 to 5, one example at a time; L_d is T^2 KL(teacher || student)."""
    T = student.config.temperature
    taught_by = TAUGHT_BY.get(student.config.recipe, ("nobody", "nobody"))
    total = 0.0
    for x, label, clean in zip(pixels, labels, is_clean):
        z = student.backbone(x[None])
        logits_of = {"original": student.original_top(z)[0], "robust": teacher(x[None])[0]}
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

BATCHES = [*product(rb.RECIPES, [[1, 0, 0, 1]]), *product(TAUGHT_BY, [[1] * 4, [0] * 4])]

@pytest.mark.parametrize("recipe, is_clean", BATCHES)
def test_student_loss_is_the_slow_loss(recipe, is_clean):
    """Its value, and its gradient in each tensor: none where a head learns from no example. A
    teacher in training mode is put into evaluation mode, and never sees an empty batch."""
    student = differ(make_student(recipe, temperature=3.0, distill_weight=0.7))
    batch = images_of(4), torch.tensor([3, 1, 0, 2]), torch.tensor(is_clean).bool()
    results = []
    for loss_of in (slow_loss, rb.student_loss):
        teacher = make_network(1)
        teacher.trains_statistics = True
        teacher.forward = mock.Mock(side_effect=teacher.forward)
        student.zero_grad()
        loss = loss_of(student, teacher.train(loss_of is rb.student_loss), *batch)
        loss.backward()
        tuned = [p for p in student.parameters() if p.requires_grad]
        results.append([torch.zeros_like(p) if p.grad is None else p.grad for p in tuned])
        results[-1].append(loss.detach())
    for slow, found in zip(*results):
        assert torch.allclose(found, slow, rtol=1e-3, atol=1e-4)
    assert all(len(call.args[0]) for call in teacher.forward.call_args_list)
    assert states_equal(teacher.state_dict(), make_network(1).state_dict())

# --- Head selection -------------------------------------------------------------------------------

def test_kl_divergence():
    p, q = noise(2, 1000, 6).softmax(-1)
    expected = kl_divergence(Categorical(probs=p), Categorical(probs=q))
    assert close(rb.kl_divergence(p, q), expected)
    near = p * (1 + 1e-6 * q)
    assert rb.kl_divergence(p, near / near.sum(-1, keepdim=True)).min() >= 0
    assert 80 < rb.kl_divergence(torch.eye(2), torch.eye(2).flip(0))[0] < math.inf

def test_mc_dropout_is_a_loop_over_masks():
    """A logit has the closed form of inverted dropout: variance p / (1 - p) * sum w^2 f^2."""
    classifier = randomise(nn.Linear(16, 3))
    features = noise(4, 16, seed=5)
    masks = rb.dropout_masks(rb.Config(passes=4000, dropout=0.3), 16)
    closed = 0.3 / 0.7 * (features**2 @ classifier.weight.T**2)
    ratio = classifier(features[:, None] * masks).var(1, correction=0) / closed
    assert ratio.mean().item() == pytest.approx(1, abs=0.05)
    phi, uncertainty = rb.mc_dropout(classifier, features, masks[:7])
    for i, f in enumerate(features):
        passes = torch.stack([classifier(f * mask).softmax(-1) for mask in masks[:7]])
        assert close(phi[i], passes.mean(0))
        assert close(uncertainty[i], passes.std(0, correction=0).mean())

# Three images: rules "u" and "kl-u" disagree; a tie; KL(m || k) and KL(k || m) disagree.
PHI_M = torch.tensor([[.5, .5, 0], [.5, .5, 0], [.4, .4, .2]])
PHI_1 = torch.tensor([[.6, .4, 0], [.7, .3, 0], [.8, .1, .1]])
PHI_2 = torch.tensor([[.9, .1, 0], [.7, .3, 0], [.5, .499, .001]])
U_1, U_2 = torch.tensor([[.3, .2, .1], [.1, .2, .1]])

@pytest.mark.parametrize("rule, expected, mirrored", [
    # kl-u: .3 * .02 < .1 * .51; a tie; .1 * .42 < .1 * .88, though KL(k || m) is .35 > .22
    ("kl-u", "ccc", "ucu"), ("kl", "ccc", "ucu"), ("u", "ucc", "ccc"),
    ("confidence", "ucc", "ccu")])
def test_select_head_rules(rule, expected, mirrored):
    """Ties stay clean."""
    for phi_c, phi_u, u_c, u_u, heads in ((PHI_1, PHI_2, U_1, U_2, expected),
                                          (PHI_2, PHI_1, U_2, U_1, mirrored)):
        phi = {"combined": PHI_M, "clean": phi_c, "unclean": phi_u}
        u = {"combined": torch.zeros(3), "clean": u_c, "unclean": u_u}
        found = rb.select_head(phi, u, rule)
        assert "".join(rb.HEADS[i][0] for i in found) == heads

@torch.no_grad()
def test_predict_returns_the_chosen_head():
    """Whatever the batch."""
    x = noise(64, 16)
    head = nn.Sequential(randomise(nn.Linear(16, 4)))
    student = rb.RobustStudent(nn.Identity(), nn.Sequential(), head, rb.Config(dropout=0.4))
    found = differ(student, 1.0).predict(x)
    u = {name: rb.mc_dropout(head.classifier, x, student.masks)[1]
         for name, head in student.heads.items()}
    assert torch.equal(found.head, rb.select_head(found.phi, u, "kl-u"))
    assert len(found.head.unique()) == 2
    for i, index in enumerate(found.head):
        alone = student.predict(x[i:i + 1])
        for probabilities in (alone.probabilities[0], found.phi[rb.HEADS[index]][i]):
            assert close(found.probabilities[i], probabilities)
        for uncertainty in (alone.uncertainty[0], u[rb.HEADS[index]][i]):
            assert close(found.uncertainty[i], uncertainty)

@torch.no_grad()
def test_modules_that_overwrite_their_input_do_no_harm():
    x, labels = images_of(4), torch.arange(4)
    found = []
    for inplace in (False, True):
        student = rb.RobustStudent(*own_modules(inplace), rb.Config())
        loss = rb.student_loss(student, make_network(1), x, labels, labels < 2)
        found.append(torch.stack([*student.predict(x).phi.values()]) + loss)
    assert close(*found)

def test_dropout_acts_while_training():
    """On what a block adds, here 1, and before each classifier; the network's own never does."""
    block = rb.BranchDropout(nn.Sequential(nn.Threshold(100.0, 6.0), nn.Dropout(0.9)))
    config = rb.Config(block_dropout=0.25, dropout=0.4)
    head = nn.Sequential(nn.Linear(64, 4))
    student = rb.RobustStudent(nn.Identity(), nn.Sequential(block), head, config)
    x = torch.full((8, 64), 5.0)
    h = student.train().shared(x)
    assert {round(value, 3) for value in (h - x).flatten().tolist()} == {0.0, 1.333}
    assert all(not torch.equal(head(h), head(h)) for head in student.heads.values())
    student.eval()
    assert torch.equal(student.shared(x), x + 1)
    assert all(torch.equal(head(h), head(h)) for head in student.heads.values())

def test_what_is_no_batch_of_pixels_is_refused():
    for photo in ((255 * images_of(2)).byte(), "photo.jpg", np.zeros((2, 3, 32, 32))):
        with pytest.raises(rb.Refusal, match="preprocess"):
            make_student().predict(photo)

def test_docstring_example_runs():
    found = doctest.testmod(rb)
    assert found.attempted > 5 and found.failed == 0

@torch.no_grad()
def test_export_with_a_dynamic_batch():
    student = differ(rb.cut(make_vit(), rb.Config(dropout=0.4)), 0.5)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(student, (images_of(2),), dynamic_shapes=(batch,))
    for x in (images_of(1), images_of(32)):
        assert close(program.module()(x), student(x))
    assert len(student.predict(x).head.unique()) == 2

# --- CLIP, prompts, classifiers -------------------------------------------------------------------

@torch.no_grad()
def embed(names):
    """(the CLIP whose weights load_network draws from its seed, embeddings of classes by hand, one
    at a time, as Sec. 4.4 says)."""
    rb.set_seed(0)
    clip = open_clip.create_model("test-vit").eval()
    rows = []
    for name in names:
        texts = [template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        encoded = F.normalize(clip.encode_text(open_clip.get_tokenizer("test-vit")(texts)), dim=-1)
        rows.append(F.normalize(encoded.mean(0), dim=-1))
    return clip, torch.stack(rows)

def clip_student(trained):
    network = rb.load_network("test-vit:none")
    network.class_names = ["ant", "bee", "cat"]
    embeddings = rb.embed_text(network.text, network.class_names)
    network.classifier = rb.CosineClassifier(*embeddings, trained)
    return rb.cut(network, rb.Config(student="test-vit:none", zero_shot=not trained))

@torch.no_grad()
def test_clip_logits_by_hand():
    clip, weight = embed(["ant", "bee", "cat"])
    x = images_of(4)
    mean = torch.tensor(clip.visual.preprocess_cfg["mean"])[:, None, None]
    std = torch.tensor(clip.visual.preprocess_cfg["std"])[:, None, None]
    encoded = F.normalize(clip.encode_image((x - mean) / std), dim=-1)
    expected = clip.logit_scale.exp() * encoded @ weight.T
    assert expected.std(0).min() > 1e-3
    student = clip_student(trained=False)
    z = student.backbone(x)
    assert close(student.original_top(z), expected, 1e-4)
    assert close(student.heads["clean"](student.shared(z)), expected, 1e-4)
    # ImageNet's folder names stand for its class names, underscores for blanks.
    found, _ = rb.embed_text(student.text, ["n01440764", "great_auk"])
    assert close(found, embed(["tench", "great auk"])[1], 1e-5)

@torch.no_grad()
def test_clip_takes_new_classes(tmp_path):
    """A zero-shot plug-in does; a trained classifier refuses, and so do names that are no words."""
    names = ["dog", "bee", "elk", "fox"]
    student = differ(clip_student(trained=False), 0.1)
    rb.save(student, tmp_path / "zs.pt")
    loaded = rb.load(tmp_path / "zs.pt", class_names=names)
    assert loaded.class_names == names
    weight = embed(names)[1]
    for head in student.heads.values():  # the tuned heads, their words swapped by hand
        head.classifier = rb.CosineClassifier(weight, head.classifier.scale, trained=False)
    assert close(loaded(images_of(4)), student(images_of(4)), 1e-5)
    rb.save(clip_student(trained=True), tmp_path / "ve.pt")
    for file, name, part in (("ve", "dog", "zero-shot"), ("zs", "7", "no word"),
                             ("zs", "n12345678", "no word")):
        with pytest.raises(rb.Refusal, match=part):
            rb.load(tmp_path / f"{file}.pt", class_names=["ant", name])

@torch.no_grad()
def test_quick_gelu_follows_the_tag(monkeypatch):
    """OpenAI's weights need QuickGELU, though the plain name of the architecture says GELU."""
    create = open_clip.create_model

    def create_without_weights(name, pretrained, **arguments):
        assert pretrained == "tag"
        return create(name, **arguments)

    default = rb.load_network("test-vit:none").net(images_of(2))
    monkeypatch.setattr(open_clip, "create_model", create_without_weights)
    for quick in (True, False):
        known = {"quick_gelu": quick, "mean": (0.3, 0.2, 0.1)}
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", mock.Mock(return_value=known))
        network = rb.load_network("test-vit:tag")
        assert list(network.prepare[1].mean) == [0.3, 0.2, 0.1]
        assert torch.equal(network.net(images_of(2)), default) != quick

def test_prompts_are_read_and_dropped():
    """Attention does not care for the place of a token."""
    block = rb.PromptedBlock(make_vit().net.blocks[0], 5)
    x = noise(2, 4, 48)
    last = torch.cat([x, block.prompts.expand(2, -1, -1)], dim=1)
    assert close(block(x), block.block(last)[:, :4], 1e-5)

@pytest.mark.parametrize("known, names, flags, becomes", [
    ("abcd", "abcd", {}, "kept"), ("abcd", "dab", {}, "kept"), ("abcd", "abcx", {}, "probed"),
    (None, "abcd", {}, "probed"), ("clip", "ab", {}, "probed text"),
    ("clip", "ab", {"zero_shot": True}, "text"), ("clip", "ab", {"recipe": "wise-ft"}, "text"),
    ("clip", "ab", {"recipe": "wise-ft-lc"}, "text")])
def test_where_a_classifier_comes_from(known, names, flags, becomes, monkeypatch):
    """The rows of its own classes are kept; a CLIP's starts at the text embeddings: VE probes it
    from there, WiSE-FT and zero shot do not."""
    network = make_network()
    before = network.classifier.weight.clone()
    if known == "clip":
        network = rb.load_network("test-vit:none")
    elif known:
        network.class_names = list(known)
    monkeypatch.setattr(rb, "all_features", lambda *arguments: ())
    monkeypatch.setattr(rb, "linear_probe", mock.Mock())
    rb.give_classifier(network, mock.Mock(classes=list(names)), rb.Config(student="x", **flags))
    weight = network.classifier.weight
    assert network.class_names == list(names) and len(weight) == len(names)
    assert rb.linear_probe.called == ("probed" in becomes)
    if becomes == "kept":
        assert torch.equal(weight, before[[known.index(name) for name in names]])
    if "text" in becomes:
        assert close(weight, embed(names)[1])
        assert weight.requires_grad != ("zero_shot" in flags)
