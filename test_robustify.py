"""Tests of robustify.py and eval.py, each against an independent oracle; no downloads, no GPU."""

import colorsys
import copy
import doctest
import importlib.util
import io
import json
import math
import multiprocessing
import os
import shutil
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
from torch.distributions import Categorical, kl_divergence

import eval as ev
import robustify as rb

MEAN = torch.tensor([0.4, 0.5, 0.6])[:, None, None]
STD = torch.tensor([0.2, 0.25, 0.3])[:, None, None]
WNIDS = timm.data.ImageNetInfo().label_names()
FISH = WNIDS[:4]
NARROW = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}  # a resnet18 of 0.02 M
TINY = {"patch_size": 16, "depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 32}
BLANK = np.zeros((8, 8, 3), np.uint8)
FLAGS = ["--workers=0", "--epochs=1", "--batch-size=8", "--lr=1e-2"]

def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def table(text):
    """Rows of cells: a row ends at |, a cell at ->."""
    return [row.split(" -> ") for row in " ".join(text.split()).split(" | ")]

def close(found, expected, atol=1e-6):
    return torch.allclose(found, expected, atol=atol)

def randomise(module, seed=0):
    """A fresh network hides wrong wiring: its norms are the identity, its layer scales tiny."""
    for i, p in enumerate(module.parameters()):
        p.data = noise(*p.shape, seed=1000 * seed + i) * (len(p) / p.numel()) ** 0.5
        if p.ndim < 2:
            p.data = 1 + p / 2
    for name, buffer in module.named_buffers():
        if "running" in name:  # mean, var
            buffer.copy_(noise(*buffer.shape).sigmoid() - 0.5 + ("var" in name))
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
    looks = [values.flatten().tolist() for values in (MEAN, STD)]
    return rb.Network("tiny", bare, classifier, size, *looks), net

def make_network(seed=0):
    """A narrow ResNet of four blocks and four classes."""
    return networks(timm.create_model("resnet18", num_classes=4, **NARROW), 32, seed)[0]

def make_vit():
    return networks(timm.create_model("vit_tiny_patch16_224", num_classes=4, **TINY), 32)[0]

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
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)

class Examples(torch.utils.data.TensorDataset):
    """Eight images by hand in place of TrainingViews, half of them clean."""
    augment, classes = "hand", list("abcd")

    def __init__(self):
        super().__init__((255 * images_of(8)).byte(), torch.arange(8) % 3, torch.arange(8) < 4)

def command(run, arguments):
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
    vit = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 16}
    resnet = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8}
    for name, tower in (("test-vit", vit), ("test-rn", resnet)):
        content = {"embed_dim": 32, "vision_cfg": {**tower, "head_width": 32}, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(content))
    open_clip.add_model_config(folder)

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with data/, teacher.pt, student.pt and robust.pt, made by command lines."""
    root = tmp_path_factory.mktemp("trained")
    make_folder(root / "data")
    assert command(rb.run, make_teacher(root, root / "teacher.pt")) == 0
    student = make_teacher(root, root / "student.pt", "test_vit:none")
    assert command(rb.run, student + ["--epochs=4", "--augment=none"]) == 0  # it is always right
    assert command(rb.run, robustify(root, root / "robust.pt")) == 0
    return root

# --- robustify.py: split, loss, heads, classifiers ------------------------------------------------

TIMM = {  # name: (name of timm, size, arguments)
    "ViT": ("vit_tiny_patch16_224", 32, TINY),
    "mean": ("vit_tiny_patch16_224", 32, {**TINY, "global_pool": "avg", "class_token": False}),
    "attention pool": ("vit_base_patch16_siglip_224", 32, TINY),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", 28, {**TINY, "patch_size": 14, "img_size": 28}),
    "ResNet": ("resnet18", 32, NARROW), "EfficientNet": ("test_efficientnet", 64, {})}

def family(name):
    """(our Network, the library's network with a classifier), of the same random weights."""
    if name in TIMM:
        library_name, size, arguments = TIMM[name]
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
    student = rb.cut(network, rb.Config(recipe="apt", fraction=fraction, head_blocks=head_blocks))
    tuned = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert tuned == min(choices, key=lambda n: abs(n / choices[0] - fraction))
    assert len(student.heads["combined"].body) == head_blocks + 1  # and the pool

def fit(model, loss_of, out, write=None, **settings):
    """Train on the Examples as robustify.py does."""
    def touch(path, **progress):
        Path(path).touch()

    config = rb.Config(lr=1e-2, workers=0, out=str(out), **settings)
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
    tuned = {name for name, _ in student.named_parameters() if name.startswith(("shared", "heads"))}
    if recipe == "vpt":
        tuned = {name for name in tuned if "prompts" in name or "classifier" in name}
    assert moved == tuned
    assert any("classifier" in name for name in moved) == (recipe != "ZS")
    counts = {"ft": rb.count_parameters(make_network()), "lp": 68, "vpt": 3 * 10 * 48 + 196}
    count = sum(before[name].numel() for name in moved)
    assert count == counts.get(recipe, count)
    rows = [head.classifier.weight for head in student.heads.values() if is_clip]
    assert all(close(row.norm(dim=-1), torch.ones(3)) for row in rows)
    for group in rb.make_optimizer(student, student.config).param_groups:
        decays = {p.ndim > 1 and all(p is not row for row in rows) for p in group["params"]}
        assert decays == {group["weight_decay"] > 0}

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
    """Whatever the batch; what is no batch of pixels is refused."""
    x = noise(64, 16)
    head = nn.Sequential(randomise(nn.Linear(16, 4)))
    student = rb.RobustStudent(nn.Identity(), nn.Sequential(), head, rb.Config(dropout=0.4))
    found = differ(student, 1.0).predict(x)
    u = {name: rb.mc_dropout(head.classifier, x, student.masks)[1]
         for name, head in student.heads.items()}
    assert torch.equal(found.head, rb.select_head(found.phi, u, "kl-u"))
    assert len(found.head.unique()) == 2
    for i, index in enumerate(found.head):
        name = rb.HEADS[index]
        alone = student.predict(x[i:i + 1])
        for p, uncertainty in ((alone.probabilities[0], alone.uncertainty[0]),
                               (found.phi[name][i], u[name][i])):
            assert close(found.probabilities[i], p) and close(found.uncertainty[i], uncertainty)
    for photo in ((255 * x).byte(), "photo.jpg", x.numpy()):
        with pytest.raises(rb.Refusal, match="preprocess"):
            student.predict(photo)

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

def test_docstring_example_runs():
    assert doctest.testmod(rb) == (0, 7)

@torch.no_grad()
def test_export_with_a_dynamic_batch():
    student = differ(rb.cut(make_vit(), rb.Config(dropout=0.4)), 0.5)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(student, (images_of(2),), dynamic_shapes=(batch,))
    for x in (images_of(1), images_of(32)):
        assert close(program.module()(x), student(x))
    assert len(student.predict(x).head.unique()) == 2

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
    student = clip_student(trained=False)
    x = images_of(4)
    encoded = F.normalize(clip.encode_image(student.backbone[0](x)), dim=-1)  # normalised pixels
    expected = clip.logit_scale.exp() * encoded @ weight.T
    assert expected.std(0).min() > 1e-3
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
    default = rb.load_network("test-vit:none").net(images_of(2))
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained, **arguments: create(
        name, pretrained=None if pretrained == "tag" else "missed", **arguments))
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
    network = rb.load_network("test-vit:none") if known == "clip" else make_network()
    if known == "abcd":
        network.class_names = list(known)
    monkeypatch.setattr(rb, "all_features", lambda *arguments: ())
    monkeypatch.setattr(rb, "linear_probe", mock.Mock())
    rb.give_classifier(network, mock.Mock(classes=list(names)), rb.Config(student="x", **flags))
    weight = network.classifier.weight
    assert network.class_names == list(names) and len(weight) == len(names)
    assert rb.linear_probe.called == ("probed" in becomes)
    if becomes == "kept":
        rows = ["abcd".index(name) for name in names]
        assert torch.equal(weight, make_network().classifier.weight[rows])
    if "text" in becomes:
        assert close(weight, embed(names)[1])
        assert weight.requires_grad != ("zero_shot" in flags)

# --- robustify.py: data, files, processes, command lines ------------------------------------------

def views_of(trained, **settings):
    """TrainingViews of sixteen images at 32 px."""
    data = str(trained / "data")
    views = rb.TrainingViews(rb.Config(data=data, mixing=data, **settings))
    views.size = 32
    return views

@pytest.mark.parametrize("augment", ["augmix+deepaugment", "augmix+pixmix"])
def test_views_depend_on_seed_epoch_and_index_alone(augment, trained, monkeypatch):
    """Whatever the workers; more processes than images are refused."""
    views = views_of(trained, augment=augment, seed=3)
    expected = torch.stack([views[i][0] for i in range(16)])
    for workers in (0, 2):
        loader, sampler = rb.batches(views, rb.Config(batch_size=5, workers=workers))
        found = torch.cat([batch[0] for batch in loader])
        assert torch.equal(found, expected[list(sampler)[:15]])
    views.epoch = 1
    for another in (views, views_of(trained, augment=augment, seed=4)):
        assert sum(torch.equal(another[i][0], expected[i]) for i in range(16)) < 8
    monkeypatch.setattr(rb, "PROCESSES", 17)
    with pytest.raises(rb.Refusal, match="17 processes"):
        rb.batches(views, views.config)

def test_coin_is_fair_and_clean_views_are_clean(trained):
    views, plain = views_of(trained), views_of(trained, augment="none")
    assert views.augmix.all_ops is False  # or it would train on ImageNet-C's corruptions
    found = []
    for views.epoch, index in product(range(15), range(16)):
        plain.epoch = views.epoch
        expected, _, is_called_clean = plain[index]
        assert is_called_clean  # nothing is augmented, nothing is called so
        found.append((views[index][2], not torch.equal(views[index][0], expected)))
    clean, changed = torch.tensor(found).T
    assert not (clean & changed).any()
    assert 89 <= clean.sum() <= 151 and changed.sum() > 60  # of 240; four standard deviations
    assert all(is_clean for _, _, is_clean in views_of(trained, recipe="lp"))

def test_noise2net_has_its_published_strength():
    """RMS change over twenty smooth images: 0.20 published, 0.09 without its last norm."""
    images = F.interpolate(noise(20, 3, 5, 5).sigmoid(), size=64, mode="bicubic").clamp(0, 1)
    torch.manual_seed(0)
    changed = torch.stack([rb.noise2net(image) for image in images])
    strength = (changed - images).square().mean((1, 2, 3)).sqrt()
    assert strength.mean().item() == pytest.approx(0.20, abs=0.03)

@pytest.mark.parametrize("x, y, a, b, multiply, expected", [
    (0.75, 1.0, 0.5, 0.25, False, 0.75),  # (0.5 * 0.5 + 0.25 * 1 + 1) / 2
    (0.75, 1.0, 1.5, -0.5, False, 0.625), (1.0, 0.0, 2.0, -1.0, False, 1.0),
    (0.0, 0.0, 0.9, 0.9, False, 0.0), (0.5, 0.1, 0.5, 0.0, True, 0.5),
    (0.125, 0.5, 0.5, 3.0, True, 0.25), (0.25, 0.125, 1.0, -0.5, True, 0.5),
    (0.5, 0.0, 1.0, -0.5, True, 1.0)])
def test_pixmix_by_hand(x, y, a, b, multiply, expected):
    found = rb.mix(torch.tensor(x), torch.tensor(y), a, b, multiply)
    assert found.item() == pytest.approx(expected)

@pytest.mark.parametrize("form", ["plain", "state_dict", "state_dict_ema", "module."])
@torch.no_grad()
def test_a_file_of_ten_outputs_keeps_them(form, tmp_path):
    """As people publish such files; without a word timm would make a random head of them."""
    net = randomise(timm.create_model("test_resnet", num_classes=10))
    state = net.state_dict()
    path = tmp_path / f"published.{form}"
    content = {"state_dict": {name: 0 * value for name, value in state.items()}, form: state}
    if form in ("plain", "module."):
        content = {f"{form.removeprefix('plain')}{name}": value for name, value in state.items()}
    torch.save(content, path)
    network = rb.load_network(f"test_resnet:{path}")
    x = images_of(2, network.size)
    assert close(network(x), net((x - 0.5) / 0.5), 1e-4) and network(x).shape == (2, 10)
    with pytest.raises(rb.Refusal, match="--teacher .*classes"):  # which are theirs?
        rb.load_teacher(rb.Config(teacher=f"test_resnet:{path}"), ["ant", "bee"])

def test_round_trip(tmp_path, monkeypatch):
    """To the bit; other weights are refused. A full disk leaves the older file whole."""
    path = tmp_path / "robust.pt"
    config = rb.Config(rule="u", seed=5)
    student = differ(rb.RobustStudent(*own_modules(), config))
    student.class_names = list("abcd")
    rb.save(student, path)
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=OSError(28, "disk full")))
    with pytest.raises(rb.Refusal, match="robust.pt.*disk full"):
        rb.save(rb.RobustStudent(*own_modules(), config), path)
    assert list(tmp_path.iterdir()) == [path]
    loaded = rb.load(path, own_modules())
    assert states_equal(loaded.state_dict(), student.state_dict())
    assert torch.equal(loaded(images_of(4)), student(images_of(4)))
    assert (loaded.config, loaded.class_names) == (config, list("abcd"))
    for part, name in ((0, "1.running_mean"), (2, "3.weight")):
        modules = own_modules()
        modules[part].state_dict()[name][0] += 1e-3
        with pytest.raises(rb.Refusal, match="other weights"):
            rb.load(path, modules)

def test_damaged_files_are_refused(trained, tmp_path):
    """Truncated, or one byte flipped in a tensor or a setting; a network is no plug-in."""
    whole = (trained / "robust.pt").read_bytes()
    place = whole.index(rb.load(trained / "robust.pt").masks.numpy().tobytes())
    contents = [whole[:length] for length in (0, 100, place, len(whole) - 1)]
    for i in (place, whole.index(b"head_blocks")):
        contents.append(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1:])
    for content in contents + [(trained / "teacher.pt").read_bytes()]:
        (tmp_path / "damaged.pt").write_bytes(content)
        with pytest.raises(rb.Refusal, match="damaged.pt"):
            rb.load(tmp_path / "damaged.pt")

def test_nan_is_refused_before_the_update(tmp_path):
    """Two steps an epoch; the fourth has a bad gradient, and what the first epoch wrote stays."""
    model = nn.Linear(3, 1)
    states = []
    write = mock.Mock()

    def loss_of(pixels, labels, is_clean):
        states.append(copy.deepcopy(model.state_dict()))
        loss = model(pixels.mean((2, 3))).mean()
        return (loss - loss.detach()).sqrt() if len(states) == 4 else loss

    with pytest.raises(rb.Refusal, match="epoch 2"):
        fit(model, loss_of, tmp_path / "out.pt", write, epochs=3, batch_size=4)
    assert [call.args for call in write.call_args_list] == [(f"{tmp_path}/out.pt.part",)]
    assert states_equal(model.state_dict(), states[3])

def forked(arguments, rank=0, processes=1, port=0, dies_at=0):
    """A process that runs the command line as torchrun would, without importing torch again. It
    dies without warning at the n-th moment: 1 before and 2 after its first write, 3 and 4 ..."""
    replace = os.replace
    moments = []

    def deadly_replace(source, target):
        for moment in ("before", "after"):
            moments.append(moment)
            if len(moments) == dies_at:
                os.kill(os.getpid(), 9)
            if moment == "before":
                replace(source, target)

    def run():
        os.replace, rb.RANK, rb.PROCESSES = deadly_replace, rank, processes
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        sys.exit(command(rb.run, arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process

@pytest.mark.parametrize("make, kind", [(robustify, "tuned"), (make_teacher, "state")])
def test_killed_at_any_moment_it_ends_with_the_same_weights(make, kind, trained, tmp_path, capfd):
    """Before the first write, in the second epoch, between the last two writes, after the last.
    Other settings, data or teachers are refused then."""
    whole, out, part = [tmp_path / name for name in ("whole.pt", "killed.pt", "killed.pt.part")]
    flags = ["--epochs=3", "--batch-size=5"]
    assert command(rb.run, make(trained, whole) + flags) == 0
    arguments = make(trained, out) + flags + ["--resume"]
    for dies_at, files in ((1, (0, 0)), (3, (1, 0)), (4, (1, 0)), (2, (1, 1))):
        process = forked(arguments, dies_at=dies_at)
        process.join()
        assert process.exitcode == -9
        assert (part.exists(), out.exists()) == files
    other = make_folder(tmp_path / "data", n=9)
    refusals = [(arguments[:-1], "--resume, or remove it"),
                (arguments + ["--augment=augmix"], "--augment was augmix+deepaugment")]
    if kind == "tuned":
        refusals += [(arguments + ["--temperature=3"], "was 2.0, is now 3.0"),
                     (arguments + [f"--data={other}"], "is now 18 images"),
                     (arguments + [f"--teacher={trained}/student.pt"], "teacher")]
    for words, message in refusals:
        assert command(rb.run, words) == 2
        assert message in capfd.readouterr().err
    assert command(rb.run, arguments) == 0
    assert "after epoch 3 of 3" in capfd.readouterr().out
    assert states_equal(rb.read_file(out)[kind], rb.read_file(whole)[kind])
    assert not part.exists()

@pytest.mark.parametrize("part, classes, tolerance", [
    ("tuned", ("bee", "ant"), 1e-5), ("state", ("bee", "ant"), 1e-5),
    ("classifier", ("cow", "dog"), 1e-3)])
def test_two_processes_equal_one(part, classes, tolerance, trained, tmp_path):
    """Without dropout; what was dark is bright now, for large gradients. New classes need a probe,
    whose end depends on the order of its images a little."""
    make = partial(make_teacher, name=trained / "student.pt") if part == "state" else robustify
    flags = ["--data", make_folder(tmp_path / "data", classes), "--augment=augmix", "--lr=1e-3",
             "--recipe=apt", "--dropout=0", "--block-dropout=0"]
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    assert command(rb.run, make(trained, one) + flags) == 0
    port = 20000 + os.getpid() % 40000
    pair = [forked(make(trained, two) + flags, rank, 2, port) for rank in (0, 1)]
    for process in pair:
        process.join()
        assert process.exitcode == 0
    expected = rb.read_file(one)[part]
    for name, value in rb.read_file(two)[part].items():
        if not name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding
            assert close(value, expected[name], tolerance), name

RUNS = """
    test_resnet:none three-heads --image-size=32 --rule=u |
    test_efficientnet:none three-heads --image-size=48 --fraction=0.5 |
    test-vit:none three-heads --zero-shot --augment=pixmix --mixing=@/data |
    test-rn:none combined-head --augment=augmix+pixmix --mixing=@/data |
    @/student.pt single-teacher --head-blocks=2 --fraction=0.9 |
    @/student.pt apt --augment=none --limit=5 | test-vit:none apt --head-blocks=0 |
    test-rn:none lp | @/student.pt vpt | test-vit:none vpt --prompts=3 |
    test_efficientnet:none ft --image-size=32 | test-rn:none ft --zero-shot |
    test_vit:none ft-augmented --image-size=48 | @/student.pt wise-ft | test-vit:none wise-ft |
    test-rn:none wise-ft-lc"""  # student, recipe, flags; @ is the folder of `trained`

@pytest.mark.parametrize("words", table(RUNS))
def test_command_lines_train_save_load_and_predict(words, trained, tmp_path, capsys):
    """One head predicts by one ordinary pass, and is at alpha 0 the original, to the bit; between
    them the weights are interpolated (WiSE-FT). Prompts make a small plug-in."""
    out = tmp_path / "out.pt"
    student, recipe, *flags = words[0].replace("@", str(trained)).split()
    flags += ["--student", student, "--recipe", recipe]
    assert command(rb.run, robustify(trained, out) + flags) == 0
    assert list(tmp_path.iterdir()) == [out]
    model = rb.load(out)
    x = images_of(5, model.size)
    found = model.predict(x)
    with torch.no_grad():
        z = model.backbone(x)
        original = model.original_top(z.clone())
        logits = {name: head(model.shared(z.clone())) for name, head in model.heads.items()}
        assert close(original, rb.load_original(out)(x), 1e-4)
    assert list(found.phi) == list(rb.RECIPES[recipe].heads)
    assert model.class_names == ["ant", "bee"]
    assert not close(found.probabilities, original.softmax(-1), 1e-5)
    one_head = nn.ModuleList([model.shared, model.heads["combined"]])
    tuned = sum(p.numel() for p in one_head.parameters() if p.requires_grad)
    share = tuned / rb.count_parameters(model.backbone, model.original_top)
    printed = capsys.readouterr().out
    for text in (f"tuned {share:.1%}", "network ", "of 2 classes", f"--model {out}"):
        assert text in printed
    if len(logits) == 1:
        assert torch.equal(found.probabilities, logits["combined"].softmax(-1))
        assert found.uncertainty.tolist() == [0] * 5
    if recipe == "vpt":
        assert out.stat().st_size < 60_000
        return
    zero = rb.load(out, alpha=0)
    if len(logits) == 1:
        assert torch.equal(zero(x), original.softmax(-1))
    for name, value in rb.load(out, alpha=0.25).state_dict().items():
        expected = 0.75 * zero.state_dict()[name] + 0.25 * model.state_dict()[name]
        assert close(value.float(), expected.float()), name

def times_in(*folders):
    return {path: path.stat().st_mtime for folder in folders for path in folder.rglob("*")}

class Evil(str):
    """Unpickling it makes the folder of this name."""
    def __reduce__(self):
        return os.mkdir, (str(self),)

REFUSALS = """
    --data=@/nowhere -> nowhere | --data=@/flat -> needs images | --data=@/one -> one class |
    --data=@/hidden -> one class | --data=@/empty -> bee | --data=@/deep -> of folders |
    --data=@/parts -> of folders | --data=@/cows -> --teacher |
    --data=@/cows --recipe=apt -> cow/0.png | --teacher= -> --make-teacher |
    --data=@/numbers --student=test-vit:none --recipe=apt -> no word |
    --teacher=@/no.pt -> --make-teacher | --teacher=$/robust.pt -> a plug-in |
    --student=$/robust.pt -> a plug-in | --student=@/no.pt -> no such file |
    --student=@/lite0.pth -> NAME:FILE | --student=@/lite0.pt -> NAME: |
    --student=test_vit:@/lite0.pth -> Missing key | --student=test_resnet:@/no.pth -> no.pth |
    --student=@/evil.pt -> evil.pt | --student=test_resnet:@/evil.pth -> evil.pth |
    --student=resnet1 -> resnet1 | --student=hf-hub:timm/resnet18 -> no name of |
    --student=test_resnet:a1 -> tags follow a dot | --student=test-vit:tag -> tag |
    --student=test_convnext:none -> timm ConvNeXt |
    --student=test_resnet:none --image-size=32 --recipe=vpt -> timm ResNet |
    --student=test_vit:none --image-size=4 -> test_vit:none | --zero-shot -> no text encoder |
    --zero-shot --recipe=lp -> --recipe lp | --augment=none -> augmented | --dropout=0 -> dropout |
    --augment=pixmix -> --mixing | --augment=mixup -> augmix+pix | --recipe=ours -> three-heads |
    --rule=best -> kl-u | --wings -> --wings | --epochs=0 -> --epochs | --passes=ten -> --passes |
    --seed=-1 -> --seed | --make-teacher=test_vit:none -> --student or --make-teacher |
    --student= --teacher= -> --student or |
    --student= --make-teacher=deit_tiny_distilled_patch16_224:none -> deit_tiny_distilled |
    --out=@ -> --out | --out=@/robust.pth -> NAME.pt | --out=@/no/out.pt -> --out |
    --out=$/student.pt -> --out | --out=$/data/../teacher.pt -> --out |
    --batch-size=0 -> --batch-size | --resume --out=$/robust.pt -> is finished"""  # @ is the test's folder, $ that of `trained`

@pytest.mark.parametrize("flags, part", table(REFUSALS))
def test_refusals_are_one_line(flags, part, trained, tmp_path, capsys):
    """On stderr, with exit code 2; nothing is left behind, and no code in a file runs."""
    files = """flat one/train/ant hidden/ant hidden/.bee empty/ant deep/ant/red deep/bee/red
        deep/bee/big parts/Train/ant parts/Train/bee parts/Test/ant cows/cow cows/dog numbers/0
        numbers/1"""
    write_images(tmp_path, {f"{file}/0.png": BLANK for file in files.split()})
    (tmp_path / "empty/bee").mkdir()
    (tmp_path / "cows/cow/0.png").write_bytes(b"broken")
    for end in (".pt", ".pth"):
        torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / f"lite0{end}")
        torch.save({"kind": "network", "x": Evil(tmp_path / "trap")}, tmp_path / f"evil{end}")
    before = times_in(tmp_path, trained)
    flags = flags.replace("@", str(tmp_path)).replace("$", str(trained)).split()
    assert command(rb.run, robustify(trained, tmp_path / "out.pt") + flags) == 2
    *bars, line = capsys.readouterr().err.splitlines()
    assert line.startswith("robustify.py: ") and part in line
    assert times_in(tmp_path, trained) == before

@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no GPU")
def test_gpu(trained, tmp_path):
    """Both programs on the GPU; what is trained there answers alike on the CPU."""
    out, record = tmp_path / "out.pt", tmp_path / "out.json"
    measure = ["eval.py", "--data", trained / "data/train", "--model", out, "--json", record]
    for words in (["robustify.py"] + robustify(trained, out), measure):
        words = [sys.executable] + [str(word) for word in words]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": GPUS}
        subprocess.run(words, check=True, cwd=Path(rb.__file__).parent, env=environment)
    pixels, labels = images_and_labels(trained / "data/train")
    expected = (rb.load(out)(pixels).argmax(-1) == labels).float().mean().item()
    found = json.loads(record.read_text())["cells"][0]["accuracy"]["out: prediction"]
    assert found == pytest.approx(expected, abs=0.13)  # two of sixteen, in bfloat16

# --- eval.py: corruptions -------------------------------------------------------------------------

FIXED = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression",
         "gaussian_blur", "saturate")

def photograph(size=32):
    """A smooth coloured image whose brightest value is 255."""
    smooth = F.interpolate(noise(1, 3, 8, 8).sigmoid(), (size, size), mode="bilinear")[0]
    return (255 * smooth / smooth.max()).round().byte()

@pytest.fixture(scope="session")
def frost(tmp_path_factory):
    """Folder of five photos."""
    photos = {f"frost{i}.png": photograph(240 + i).permute(1, 2, 0).numpy() for i in range(1, 6)}
    return str(write_images(tmp_path_factory.mktemp("frost"), photos))

@pytest.mark.parametrize("name", ev.CORRUPTIONS)
def test_corruption_depends_on_seed_image_and_severity(name, frost):
    """On nothing else, at any size."""
    image = photograph() // 2  # dark: what adds light is not cut off
    found = ev.corrupt(image, name, 5, 3, 1, frost)
    assert found.dtype == torch.uint8 and not torch.equal(found, image)
    torch.manual_seed(6)
    assert torch.equal(ev.corrupt(image, name, 5, 3, 1, frost), found)
    for index, seed in ((4, 1), (3, 2)):
        other = ev.corrupt(image, name, 5, index, seed, frost)
        assert torch.equal(other, found) == (name in FIXED)
    assert not torch.equal(ev.corrupt(image, name, 4, 3, 1, frost), found)
    assert ev.corrupt(photograph(230), name, 1, 0, 0, frost).shape == (3, 230, 230)

@pytest.mark.parametrize("name, severity, added, factor, shift", [
    ("brightness", 1, 0.1, 1, 0), ("brightness", 5, 0.5, 1, 0), ("saturate", 1, 0, 0.3, 0),
    ("saturate", 4, 0, 5, 0.1)])
def test_brightness_and_saturate_are_hsv(name, severity, added, factor, shift):
    image = photograph(16)
    image[:, 0] = torch.arange(16).byte() * 16  # greys, from black on
    found = ev.corrupt(image, name, severity)
    for row, column in np.ndindex(16, 16):
        h, s, v = colorsys.rgb_to_hsv(*(image[:, row, column] / 255).tolist())
        expected = colorsys.hsv_to_rgb(h, min(s * factor + shift, 1), min(v + added, 1))
        assert found[:, row, column].numpy() == pytest.approx(255 * np.array(expected), abs=1.001)

def test_jpeg_is_pillows():
    file = io.BytesIO()
    Image.fromarray(photograph(64).permute(1, 2, 0).numpy()).save(file, "JPEG", quality=25)
    found = ev.corrupt(photograph(64), "jpeg_compression", 5)
    assert np.array_equal(found.permute(1, 2, 0), Image.open(file))

@pytest.mark.parametrize("name, deviation", [
    ("gaussian_noise", 0.12), ("speckle_noise", 0.5 * 0.25), ("shot_noise", (0.5 / 50) ** 0.5),
    ("impulse_noise", 0.05**0.5 / 2)])
def test_noise_statistics(name, deviation):
    """At severity 3 for 64 px, on grey; Poisson's variance is the mean."""
    grey = torch.full((3, 64, 64), 128).byte()
    noisy = torch.stack([ev.corrupt(grey, name, 3, i) for i in range(4)]) / 255
    assert abs(noisy.mean() - 128 / 255) < 0.004  # half a level is lost where noise is truncated
    assert noisy.std().item() == pytest.approx(deviation, rel=0.03)

def test_defocus_is_a_disk():
    image = photograph(10)[0] / 255
    padded = np.pad(image.numpy(), 3, "reflect")
    expected = np.zeros((10, 10))
    for down, right in np.ndindex(7, 7):
        if (down - 3)**2 + (right - 3)**2 <= 9:
            expected += padded[down:down + 10, right:right + 10] / 29
    found = ev.defocus_blur(image.expand(3, -1, -1), radius=3, alias=0.01)[1]
    assert found.numpy() == pytest.approx(expected, abs=1e-5)

@pytest.mark.parametrize("shift", [1, 3])
def test_glass_blur_is_a_loop_over_pixels(shift):
    n = 16
    image = ev.levels(noise(3, n, n).sigmoid()) / 255
    torch.manual_seed(0)
    found = ev.glass_blur(image.clone(), sigma=0.05, shift=shift, rounds=3)  # too narrow to blur
    torch.manual_seed(0)
    for _ in range(3):
        moves = torch.randint(-shift, shift, (2, n, n))
        for row, column in product(range(n - shift, shift, -1), range(n - shift, shift, -1)):
            down, right = moves[:, row, column].tolist()
            image[:, row, column] = image[:, row + down, column + right]
    assert close(found, image)

@pytest.mark.parametrize("angle", [0, 90])
def test_motion_blur_of_a_point(angle):
    """From right to left, or upwards."""
    x = F.pad(torch.ones(1, 1, 1), (15,) * 4)
    weights = np.exp(-np.arange(11)**2 / (2 * 3**2))
    expected = np.zeros((31, 31))
    expected[15, 15:4:-1] = np.floor(255 * weights / weights.sum())
    found = ev.motion_blur(x, radius=5, sigma=3, low=angle, high=angle + 1e-5)[0].numpy()
    assert 255 * (found.T if angle else found) == pytest.approx(expected, abs=0.01)

def test_zoom_blur_of_a_line():
    n = 224
    line = noise(n).sigmoid().numpy()
    total = line.copy()
    for step in range(12):  # 1.11 itself, too: arange rounds
        factor = 1 + step / 100
        crop = math.ceil(n / factor)
        size = round(crop * factor)
        read = (n - crop) // 2 + np.linspace(0, crop - 1, size)[(size - n) // 2:][:n]
        total += np.interp(read, np.arange(n), line)
    found = ev.zoom_blur(torch.from_numpy(line).expand(3, n, n), stop=1.11, step=0.01)[0, 0]
    assert found.numpy() == pytest.approx(total / 13, abs=1e-4)

# --- eval.py: folders, models, tables -------------------------------------------------------------

CLOCK, RADIO, BANANA = WNIDS[530], WNIDS[409], WNIDS[954]  # two outputs mean a clock
FOLDERS = {"wnids": FISH, "numbers": ["1", "0", "2"], "names": ["ant", "bee"],
           "thousand": [str(i) for i in range(1000)], "objectnet": ["z_clock", "banana", "box"]}
MODELS = {"imagenet": WNIDS, "wnids": FISH[::-1] + [RADIO, CLOCK, BANANA], "names": ["bee", "ant"],
          "numbers": ["0", "1", "10", "2"], "unnamed": None, "clip": None,
          "zero-shot": ["ant", "bee", "cow"]}
CLOCKS = {"z_clock": {CLOCK, RADIO}, "banana": {BANANA}}
SAME = {name: {name} for name in FISH + ["ant", "bee", "0", "1", "2"]}
WNID = {str(i): {wnid} for i, wnid in enumerate(WNIDS)}
GRID = {  # folder: what its classes mean to each of MODELS, or a word of the refusal
    "wnids": [SAME, SAME, "unknown", "unknown", "unknown", SAME, SAME],
    "numbers": [WNID, WNID, "unknown", SAME, "unknown", "no word", "no word"],
    "names": ["unknown", "unknown", SAME, "unknown", {"ant": {0}, "bee": {1}}, SAME, SAME],
    "thousand": [WNID, "unknown", "unknown", "unknown", "unknown", WNID, WNID],
    "objectnet": [CLOCKS, CLOCKS, "unknown", "unknown", "unknown", CLOCKS, CLOCKS]}

@pytest.mark.parametrize("kind", FOLDERS)
def test_class_mapping(kind, tmp_path, monkeypatch):
    """Each cell of the table in eval.py's docstring. A box is no class of ImageNet's."""
    folder = "images" if kind == "objectnet" else "."
    write_images(tmp_path, {f"{folder}/{name}/0.png": BLANK for name in FOLDERS[kind]})
    if kind == "objectnet":
        (tmp_path / "mappings").mkdir()
        for name, content in (
                ("folder_to_objectnet_label", {"z_clock": "A clock", "box": "Box", "banana": "B"}),
                ("imagenet_pytorch_id_to_objectnet_id", {"409": 0, "530": 0, "954": 1})):
            (tmp_path / f"mappings/{name}.json").write_text(json.dumps(content))
    args = ev.parse(["--data", "x"])
    cell = ev.read_folder(str(tmp_path), "set", args)[0]
    assert len(cell.samples) == len(cell.classes) == len(FOLDERS[kind]) - (kind == "objectnet")
    monkeypatch.setattr(open_clip, "build_zero_shot_classifier", mock.MagicMock())
    monkeypatch.setattr(ev, "set_classes", mock.Mock())
    for model, expected in zip(MODELS, GRID[kind]):
        network = mock.Mock(text=None, classes=2)
        if model in ("clip", "zero-shot"):
            network.text = (mock.MagicMock(), None)
        network.class_names = MODELS[model]
        column = ev.Column(model, network, MODELS[model])
        ev.set_classes.reset_mock()
        if isinstance(expected, str):
            with pytest.raises(rb.Refusal, match=expected):
                ev.set_outputs(column, cell, args)
            continue
        ev.set_outputs(column, cell, args)
        names = MODELS[model] or [0, 1]
        if ev.set_classes.called:
            names = ev.set_classes.call_args.args[1]
        found = [{names[i] for i in outputs} for outputs in column.outputs.tolist()]
        assert found == [expected[name] for name in cell.classes], model

@pytest.fixture
def evaluate(tmp_path, capsys):
    """flags -> (exit code, {"COLUMN: PREDICTOR FOLDER/CORRUPTION/SEVERITY": accuracy}, {label: row}
    of the printed tables, all that was printed)."""
    def run(*flags):
        file = tmp_path / "out.json"
        file.unlink(missing_ok=True)
        code = command(ev.run, ["--workers=0", "--json", file, *flags])
        found = {}
        for cell in json.loads(file.read_text())["cells"] if file.is_file() else []:
            name = f"{cell['folder']}/{cell['corruption']}/{cell['severity']}".removesuffix("//0")
            found.update({f"{key} {name}": value for key, value in cell["accuracy"].items()})
        output = capsys.readouterr()
        lines = [line.strip("| ").split("|") for line in output.out.splitlines()]
        table = {line[0].strip(): [word.strip() for word in line[1:]] for line in lines[::-1]}
        return code, found, table, output.out + output.err.rpartition("eval.py: ")[2]

    return run

@pytest.fixture(scope="session")
def plug_ins(trained, tmp_path_factory):
    """And large.pt of 48 px; three.pt, apt.pt and seed.pt of student.pt, whose heads disagree."""
    root = shutil.copytree(trained, tmp_path_factory.mktemp("plug_ins"), dirs_exist_ok=True)
    shutil.copytree(root / "data/train", root / "data/val")
    command(rb.run, make_teacher(root, root / "large.pt") + ["--image-size=48"])
    for name, settings in (("three", {}), ("seed", {"seed": 1}), ("apt", {"recipe": "apt"})):
        config = rb.Config(student=str(root / "student.pt"), teacher=str(root / "teacher.pt"),
                           dropout=0.3, **settings)
        rb.save(differ(rb.cut(rb.load_network(config.student), config), 0.6), root / f"{name}.pt")
    return root

def test_layouts_of_published_corruptions(plug_ins, evaluate, tmp_path):
    """A whole tree, partly in groups, one corruption, one severity. A corruption counts once,
    however many severities it has; thin cells and missing ones are named."""
    whole, student = tmp_path / "in-c", ["--model", plug_ins / "student.pt", "--data"]
    for cell, wrong in (("fog/1", 0), ("fog/2", 0), ("fog/3", 1), ("blur/zoom_blur/1", 0),
                        ("blur/zoom_blur/2", 0)):
        for name, other in (("ant", "bee"), ("bee", "ant")):
            shutil.copytree(plug_ins / "data/val" / (other if wrong else name), whole / cell / name)
    (whole / "blur/zoom_blur/2/bee/0.png").unlink()
    (whole / "fog/4").mkdir()  # an empty folder of a stopped download
    _, _, table, text = evaluate(*student, whole)
    assert "zoom_blur 2" in text and "zoom_blur 3" in text and "mCE" not in table
    assert [table[row] for row in ("fog", "zoom_blur", "mean error")] == [
        ["66.7"], ["100.0"], ["16.7"]]
    assert evaluate(*student, whole / "fog", "--limit", 2)[2]["fog"] == ["66.7"]
    assert evaluate(*student, whole / "fog/3")[1]["student: prediction 3/fog/3"] == 0
    assert "already" in evaluate(*student, whole / "fog", "--corrupt", "fog")[3]
    broken = whole / "fog/2/bee/3.png"
    broken.write_bytes(b"broken")  # what was measured before it stays in --json
    code, found, _, text = evaluate(*student, whole / "fog")
    assert code == 2 and str(broken) in text
    assert {key.split("/")[-1] for key in found} == {"1"}
    shutil.copytree(whole / "fog", whole / "weather/fog")
    assert "same corruption" in evaluate(*student, whole)[3]

def cell(right, corruption="", severity=0):
    """A measured Cell of the 1000 classes."""
    samples = [("file", i) for i in range(len(right))]
    return ev.Cell("set", WNIDS, samples, corruption, severity,
                   right={("m", "prediction"): np.array(right, bool)})

def test_mce_by_hand(capsys):
    """Independent sums over random results; only for ImageNet's 1000 classes under all fifteen."""
    rng = np.random.default_rng(0)
    error = dict.fromkeys(ev.ALEXNET, 0.0)
    folder = []
    for name, severity in product([*ev.ALEXNET, "saturate"], range(1, 6)):
        folder.append(cell(rng.random(50) < 0.8 - 0.05 * severity, name, severity))
        if name in error:
            error[name] += (1 - folder[-1].right["m", "prediction"].mean()) / 5
    column = ev.Column("m", mock.Mock(classes=1000, text=None), WNIDS)
    mce = sum(error[name] / ev.ALEXNET[name] for name in error) / 15
    for is_whole in (True, False):
        ev.report(folder, [column], ["m"], mock.Mock(limit=0, json=None))
        printed = " ".join(capsys.readouterr().out.replace("|", " ").split())
        assert f"mean error {100 * sum(error.values()) / 15:.1f}" in printed
        assert (f"mCE {100 * mce:.1f}" in printed) == ("mCE" in printed) == is_whole
        folder[7].samples.pop()

def test_differences_and_averages_by_hand(capsys):
    """Differences +1/2, +1, 0, 0 of four images; averages without the first folder."""
    folder = [cell((1, 1, 0, 0), "fog", 1), cell((0, 1, 0, 0), "snow", 1)]
    for one in folder:
        one.right["b", "prediction"] = np.zeros(4, bool)
    error = 200 * np.array([0.5, 1, 0, 0]).std(ddof=1) / 2
    assert ev.paired(folder, "m", "b") == f"+37.5 +- {error:.1f}"
    folders = [[cell(values)] for values in ((1, 1, 1, 1), (1, 0, 0, 0), (1, 1, 1, 0))]
    ev.average_of_shifts(folders, ["m"])
    assert "50.0" in capsys.readouterr().out.splitlines()[-1]

@pytest.mark.parametrize("size, made_at", [
    ((20, 20), 64), ((64, 64), 64), ((30, 50), 224), ((300, 240), 224), ((75, 75), 224)])
def test_views(size, made_at, plug_ins, tmp_path):
    """Are those of preprocess; published squares are seen as they are, corruptions are made at
    224 px, or of a small square at 64."""
    student = rb.load(plug_ins / "three.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    path = write_images(tmp_path, {"0.png": pixels}) / "0.png"
    cells = [ev.Cell("set", [], [(path, 0)], "contrast", 2, published) for published in (0, 1)]
    cells.append(ev.Cell("set", [], [(path, 0)]))
    made, published, clean = [item[0] for item in ev.Views(cells, {32, 48}, mock.Mock(seed=0))]
    image = rb.read_image(path)
    for student.size in (32, 48):
        assert torch.equal(clean[student.size] / 255, student.preprocess(Image.open(path)))
    assert torch.equal(made[0], ev.corrupt(rb.centre_view(image, made_at), "contrast", 2))
    assert torch.equal(published.get(0, image), image)
    assert (0 in published) == (size[0] == size[1])

@torch.no_grad()
def test_every_predictor(plug_ins, evaluate, monkeypatch):
    """One pass over models of several sizes against each alone; M_b runs once for all plug-ins."""
    monkeypatch.chdir(plug_ins)
    columns = []
    load_columns = ev.load_columns

    def spy(args):
        columns.extend(load_columns(args))
        for backbone in {column.model.backbone for column in columns if column.group}:
            backbone.forward = mock.Mock(side_effect=backbone.forward)
        return columns

    monkeypatch.setattr(ev, "load_columns", spy)
    networks = ["student.pt", "large.pt", "test-vit:none"]
    _, found, table, _ = evaluate("--data", "data", "--average", "--alpha", 0, 0.5, 1, "--model",
                                  "three.pt", "seed.pt", "apt.pt", *networks)
    images, labels = images_and_labels(plug_ins / "data/val")
    expected = {}
    answers = []
    for name, alpha in product(("three", "seed", "apt"), (0.0, 0.5, 1.0)):
        one = rb.load(f"{name}.pt", alpha=alpha).predict(images)
        right = {f"{head} head": phi.argmax(-1) == labels for head, phi in one.phi.items()}
        right["prediction"] = one.probabilities.argmax(-1) == labels
        if name != "apt":
            right["selected"] = right["prediction"]
            right["oracle"] = right["clean head"] | right["unclean head"]
            right["clean head chosen"] = one.head == 0
        expected.update({f"{name} alpha {alpha:g}: {key}": row for key, row in right.items()})
        answers.append(one.probabilities)
    for name in networks:
        network = rb.load_network(name)
        if network.text:
            rb.set_classes(network, ["ant", "bee"], *rb.embed_text(network.text, ["ant", "bee"]))
        x = torch.stack([rb.centre_view((255 * image).byte(), network.size) for image in images])
        answers.append(network(x / 255).softmax(-1))
        expected[f"{name.removesuffix('.pt')}: prediction"] = answers[-1].argmax(-1) == labels
    expected["original of three: prediction"] = expected["student: prediction"]
    expected["average: prediction"] = sum(answers).argmax(-1) == labels
    for key, right in expected.items():
        assert found[f"{key} data"] == pytest.approx(right.float().mean().item()), key
    assert "+-" in table["student minus three alpha 0"][0]
    calls = {column.model.backbone.forward.call_count for column in columns if column.group}
    assert calls == {1} and [c.name for c in columns if c.is_original] == ["original of three"]

def test_cost_transfer_and_plot(plug_ins, evaluate, tmp_path):
    """Of each recipe; a probe on what the original gives and what was tuned; a picture is drawn."""
    data, picture = plug_ins / "data", tmp_path / "plot.png"
    draws = importlib.util.find_spec("matplotlib") is not None
    _, _, table, _ = evaluate("--cost", "--transfer", data, *["--plot", picture] * draws, "--data",
                              data, "--corrupt", "contrast", "--severity", 1, 5, "--model",
                              plug_ins / "three.pt", plug_ins / "student.pt")
    assert picture.exists() == draws
    steps = {recipe: float(table[f"training step, {recipe}"][1]) for recipe in rb.RECIPES}
    assert 0.99 < steps["lp"] < steps["apt"] < steps["three-heads"] < steps["ft"] < 3.1
    assert 1 < float(table["inference, three-heads"][1]) < 2
    assert table["three, original"][0] == table["student, original"][0]
    assert float(table["three, tuned"][0]) > 90 and "+-" in table["three, tuned"][1]

REFUSED = """
    --data @/nowhere -> nowhere | --data @/cows -> cow | --data @/levels -> levels |
    --data @/objectnet -> mappings | --data -> --data | --model no.pt -> no.pt |
    --model @/apt.pt @/./apt.pt -> same | --model test_resnet:@/no.pth -> no.pth |
    --model @/apt.pt --rule u -> one head | --corrupt rain -> rain | --wings -> --wings |
    --corrupt frost -> --frost | --frost @/cows -> --frost | --severity 6 -> --severity |
    --frost @/cows --corrupt frost -> frost | --limit -1 -> below 0 | --alpha 2 -> --alpha |
    --templates photo -> --templates | --templates {x}{} -> --templates |
    --templates {} -> --templates | --passes 0 -> --passes | --alpha 0.5 -> --alpha |
    --rule u -> --rule | --image-size 64 -> --image-size | --json @ -> json |
    --json @/student.pt -> student.pt | --json @/data/out.json -> out.json |
    --plot @/student.pt -> student.pt | --cost -> --cost | --transfer @/data -> train"""  # @ is the test's folder; later flags win

@pytest.mark.parametrize("flags, part", table(REFUSED))
def test_refusals_come_before_the_first_image(flags, part, plug_ins, tmp_path, monkeypatch, capsys):
    """One line on stderr, exit code 2, nothing read and nothing written."""
    folders = """cows/ant cows/cow data/val/ant data/val/bee objectnet/images/ant levels/fog/ant
        levels/snow/ant"""
    write_images(tmp_path, {f"{folder}/0.png": BLANK for folder in folders.split()})
    (tmp_path / "objectnet/mappings").mkdir()
    for name in ("student.pt", "apt.pt"):
        shutil.copy(plug_ins / name, tmp_path)
    monkeypatch.setattr(ev, "read_image", None)
    before = times_in(tmp_path)
    given = f"--data @/data --model @/student.pt --json @/out.json {flags}"
    assert command(ev.run, given.replace("@", str(tmp_path)).split()) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("eval.py: ") and part in line
    assert times_in(tmp_path) == before
