"""Tests of robustify.py and eval.py, each against an independent oracle; no downloads, no GPU."""

import colorsys
import copy
import doctest
import io
import json
import math
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

MEAN, STD = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.25, 0.3]])
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
        if "running" in name:
            buffer.copy_(noise(*buffer.shape).sigmoid() + ("var" in name) - 0.5)
    return module.eval().requires_grad_(True)

def images_of(n, size=32):
    return (0.7 * noise(n, 3, 1, 1) + 0.3 * noise(n, 3, size, size, seed=1)).sigmoid()

def write_images(root, images):
    for path, image in images.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / path, "PNG")
    return root

def make_folder(root, classes=("ant", "bee"), n=8):
    rng = np.random.default_rng(0)
    for name, i in product(classes, range(n)):
        pixels = rng.integers(0, 128, (32, 32, 3)) + 100 * (name == classes[-1])  # bright
        write_images(root, {f"train/{name}/{i}.png": pixels.astype(np.uint8)})
    return root

def images_and_labels(root):
    images = rb.ImageClasses(root)
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in images]
    return torch.stack(pixels) / 255, torch.tensor([label for _, label in images])

def networks(net, size, seed=0):
    """(our Network, the library's), of the same random weights."""
    bare = copy.deepcopy(randomise(net, seed))
    classifier = bare.get_classifier()
    bare.reset_classifier(0)
    return rb.Network("tiny", bare, classifier, size, MEAN.tolist(), STD.tolist()), net

def make_network(seed=0):
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
    backbone = nn.Sequential(nn.SiLU(inplace), nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8))
    shared = nn.Sequential(nn.SiLU(inplace), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    head = nn.Sequential(nn.SiLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return [randomise(module) for module in (backbone, shared, head)]

same = partial(torch.testing.assert_close, rtol=0, atol=0)  # also of dictionaries

class Examples(torch.utils.data.TensorDataset):  # in place of TrainingViews
    augment, classes, seen = "hand", list("abcd"), []
    def __init__(self):
        super().__init__((255 * images_of(8)).byte(), torch.arange(8) % 3, torch.arange(8) < 4)
    def __getitem__(self, index):
        self.seen.append((self.epoch, index))
        return super().__getitem__(index)

def command(run, arguments):
    with mock.patch.object(sys, "argv", [f"{run.__module__}.py"] + [str(a) for a in arguments]):
        return rb.main(run)

def robustify(folder, out):
    return [f"--student={folder}/student.pt", f"--teacher={folder}/teacher.pt",
            f"--data={folder}/data", f"--out={out}"] + FLAGS

def make_teacher(folder, out, name="test_convnext:none"):
    return [f"--make-teacher={name}", "--image-size=32", f"--data={folder}/data",
            f"--out={out}"] + FLAGS

@pytest.fixture(scope="session", autouse=True)
def clips(tmp_path_factory):
    """Two tiny CLIPs that open_clip knows by name."""
    folder = tmp_path_factory.mktemp("clips")
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vit = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 16, "head_width": 32}
    resnet = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 32}
    for name, tower in (("test-vit", vit), ("test-rn", resnet)):
        content = {"embed_dim": 32, "vision_cfg": tower, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(content))
    open_clip.add_model_config(folder)

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with data/, teacher.pt, student.pt and robust.pt, made by command lines."""
    root = make_folder(tmp_path_factory.mktemp("trained") / "data").parent
    student = make_teacher(root, root / "student.pt", "test_vit:none")
    student += ["--epochs=4", "--augment=none"]  # it is always right
    for arguments in (make_teacher(root, root / "teacher.pt"), student,
                      robustify(root, root / "robust.pt")):
        assert command(rb.run, arguments) == 0
    return root

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
    tower.get_classifier = partial(rb.CosineClassifier, noise(5, 32), 5.0, trained=True)
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
    expected = net((small - MEAN[:, None, None]) / STD[:, None, None])
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
    config = rb.Config(lr=1e-2, workers=0, out=str(out), **settings)
    rb.fit(model, loss_of, Examples(), config, write or (lambda path, **_: Path(path).touch()))

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
    assert moved == tuned and any("classifier" in name for name in moved) == (recipe != "ZS")
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

@pytest.mark.parametrize("recipe, is_clean", [
    *product(rb.RECIPES, [[1, 0, 0, 1]]), *product(TAUGHT_BY, [[1] * 4, [0] * 4])])
def test_student_loss_is_the_slow_loss(recipe, is_clean):
    """Its value, and its gradient in each tensor: none where a head learns from no example. A
    teacher in training mode is put into evaluation mode, and never sees an empty batch."""
    student = differ(make_student(recipe, temperature=3.0, distill_weight=0.7))
    batch = images_of(4), torch.tensor([3, 1, 0, 2]), torch.tensor(is_clean).bool()
    tuned = [p for p in student.parameters() if p.requires_grad]
    results = []
    for loss_of in (slow_loss, rb.student_loss):
        teacher = make_network(1)
        teacher.trains_statistics = True
        teacher.forward = mock.Mock(side_effect=teacher.forward)
        student.zero_grad()
        loss = loss_of(student, teacher.train(loss_of is rb.student_loss), *batch)
        loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in tuned]
        results.append(torch.cat([loss.detach().view(1)] + [g.flatten() for g in gradients]))
    assert torch.allclose(*results, rtol=1e-3, atol=1e-4)
    assert all(len(call.args[0]) for call in teacher.forward.call_args_list)
    same(teacher.state_dict(), make_network(1).state_dict())

def test_kl_divergence():
    p, q = noise(2, 1000, 6).softmax(-1)
    expected = kl_divergence(Categorical(probs=p), Categorical(probs=q))
    assert close(rb.kl_divergence(p, q), expected)
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
PHI = torch.tensor([[[.6, .4, 0], [.7, .3, 0], [.8, .1, .1]],
                    [[.9, .1, 0], [.7, .3, 0], [.5, .499, .001]]])
U = torch.tensor([[.3, .2, .1], [.1, .2, .1]])

@pytest.mark.parametrize("rule, expected, mirrored", [
    # kl-u: .3 * .02 < .1 * .51; a tie; .1 * .42 < .1 * .88, though KL(k || m) is .35 > .22
    ("kl-u", "ccc", "ucu"), ("kl", "ccc", "ucu"), ("u", "ucc", "ccc"),
    ("confidence", "ucc", "ccu")])
def test_select_head_rules(rule, expected, mirrored):
    for c, u, heads in ((0, 1, expected), (1, 0, mirrored)):
        phi = {"combined": PHI_M, "clean": PHI[c], "unclean": PHI[u]}
        found = rb.select_head(phi, {"clean": U[c], "unclean": U[u]}, rule)
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
        found.append(torch.stack(list(student.predict(x).phi.values())) + loss)
    assert close(*found) and torch.equal(x, images_of(4))

def test_dropout_acts_while_training():
    """On what a block adds, here 1, and before each classifier; the network's own never does."""
    block = rb.BranchDropout(nn.Sequential(nn.Threshold(100.0, 6.0), nn.Dropout(0.9)))
    config = rb.Config(block_dropout=0.25, dropout=0.4)
    student = rb.RobustStudent(nn.Identity(), nn.Sequential(block),
                               nn.Sequential(nn.Linear(64, 4)), config)
    x = torch.full((8, 64), 5.0)
    for training in (True, False):
        h = student.train(training).shared(x)
        added = {round(value, 3) for value in (h - x).flatten().tolist()}
        assert added == ({0.0, 1.333} if training else {1.0})
        assert all(torch.equal(head(h), head(h)) != training for head in student.heads.values())

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
    x = student.backbone[0](images_of(4))  # normalised
    z = student.backbone(images_of(4))
    expected = clip.logit_scale.exp() * F.normalize(clip.encode_image(x), dim=-1) @ weight.T
    assert expected.std(0).min() > 1e-3
    assert close(student.original_top(z), expected, 1e-4)
    assert close(student.heads["clean"](student.shared(z)), expected, 1e-4)
    # ImageNet's folder names stand for its class names, underscores for blanks.
    found, _ = rb.embed_text(student.text, ["n01440764", "great_auk"])
    assert close(found, embed(["tench", "great auk"])[1], 1e-5)

@torch.no_grad()
def test_clip_takes_new_classes(tmp_path):
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
    for file, name in (("ve", "dog"), ("zs", "7"), ("zs", "n12345678")):
        with pytest.raises(rb.Refusal, match="zero-shot" if file == "ve" else "no word"):
            rb.load(tmp_path / f"{file}.pt", class_names=["ant", name])

@torch.no_grad()
def test_quick_gelu_follows_the_tag(monkeypatch):
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
    ("", "abcd", {}, "probed"), ("clip", "ab", {}, "probed text"),
    ("clip", "ab", {"zero_shot": True}, "text"), ("clip", "ab", {"recipe": "wise-ft"}, "text"),
    ("clip", "ab", {"recipe": "wise-ft-lc"}, "text")])
def test_where_a_classifier_comes_from(known, names, flags, becomes, monkeypatch):
    """VE probes a CLIP from its text embeddings, WiSE-FT and zero shot do not."""
    network = rb.load_network("test-vit:none") if known == "clip" else make_network()
    network.class_names = list(known) if known == "abcd" else None
    monkeypatch.setattr(rb, "all_features", lambda net, _: (net.features(images_of(1)), None))
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

def views_of(trained, **settings):
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
    for plain.epoch, index in product(range(15), range(16)):
        views.epoch = plain.epoch
        found.append((plain[index][2], views[index][2],
                      not torch.equal(views[index][0], plain[index][0])))
    unchanged, clean, changed = torch.tensor(found).T
    assert unchanged.all()  # where nothing is augmented, nothing is called so
    assert not (clean & changed).any()
    assert 89 <= clean.sum() <= 151 and changed.sum() > 60  # of 240; four standard deviations
    assert all(is_clean for _, _, is_clean in views_of(trained, recipe="lp"))

def test_noise2net_has_its_published_strength():
    images = F.interpolate(noise(20, 3, 5, 5).sigmoid(), size=64, mode="bicubic").clamp(0, 1)
    torch.manual_seed(0)
    changed = torch.stack([rb.noise2net(image) for image in images])
    assert 0.17 < (changed - images).square().mean((1, 2, 3)).sqrt().mean() < 0.23  # 0.20

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
    content = {"state_dict": {name: 0 * value for name, value in state.items()}, form: state}
    if form in ("plain", "module."):
        content = {f"{form.removeprefix('plain')}{name}": value for name, value in state.items()}
    torch.save(content, tmp_path / "published.pth")
    network = rb.load_network(f"test_resnet:{tmp_path}/published.pth")
    x = images_of(2, network.size)
    assert close(network(x), net((x - 0.5) / 0.5), 1e-4) and network(x).shape == (2, 10)

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
    same(loaded.state_dict(), student.state_dict())
    assert (loaded.config, loaded.class_names) == (config, list("abcd"))
    for part in (0, 2):
        modules = own_modules()
        modules[part].state_dict()[("2.running_mean", "", "3.weight")[part]][0] += 1e-3
        with pytest.raises(rb.Refusal, match="other weights"):
            rb.load(path, modules)

def test_damaged_files_are_refused(trained, tmp_path):
    whole = (trained / "robust.pt").read_bytes()
    place = whole.index(rb.load(trained / "robust.pt").masks.numpy().tobytes())  # a tensor
    contents = [whole[:100], whole[:place], whole[:-1], (trained / "teacher.pt").read_bytes()]
    for i in (place, whole.index(b"head_blocks")):
        contents.append(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1:])
    for content in contents:
        (tmp_path / "damaged.pt").write_bytes(content)
        with pytest.raises(rb.Refusal, match="damaged.pt"):
            rb.load(tmp_path / "damaged.pt")

def test_nan_is_refused_before_the_update(tmp_path):
    """Until then each epoch has its order, and each step its own noise of dropout."""
    model, write = nn.Linear(3, 1), mock.Mock()
    states, seeds = [], set()
    Examples.seen.clear()

    def loss_of(pixels, labels, is_clean):
        states.append(copy.deepcopy(model.state_dict()))
        seeds.add(torch.initial_seed())
        loss = model(pixels.mean((2, 3))).mean()
        return (loss - loss.detach()).sqrt() if len(states) == 4 else loss

    with pytest.raises(rb.Refusal, match="epoch 2"):  # which has steps 3 and 4
        fit(model, loss_of, tmp_path / "out.pt", write, epochs=3, batch_size=4)
    epochs, order = zip(*Examples.seen)
    assert epochs == (0,) * 8 + (1,) * 8 and len(seeds) == 4
    assert sorted(order[:8]) == list(range(8)) and order[:8] != order[8:]
    assert [call.args for call in write.call_args_list] == [(f"{tmp_path}/out.pt.part",)]
    same(model.state_dict(), states[3])

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

    process = torch.multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process

@pytest.mark.parametrize("make, kind", [(robustify, "tuned"), (make_teacher, "state")])
def test_killed_at_any_moment_it_ends_with_the_same_weights(make, kind, trained, tmp_path, capfd):
    whole, out, part = [tmp_path / name for name in ("whole.pt", "killed.pt", "killed.pt.part")]
    flags = ["--epochs=3", "--batch-size=5"]
    assert command(rb.run, make(trained, whole) + flags) == 0
    arguments = make(trained, out) + flags + ["--resume"]
    for dies_at, files in ((1, (0, 0)), (3, (1, 0)), (4, (1, 0)), (2, (1, 1))):  # epochs 1, 2, 3
        process = forked(arguments, dies_at=dies_at)
        process.join()
        assert process.exitcode == -9 and (part.exists(), out.exists()) == files
    refusals = [(arguments[:-1], "--resume, or remove it"),
                (arguments + ["--augment=augmix"], "--augment was augmix+deepaugment")]
    if kind == "tuned":
        refusals += [(arguments + ["--temperature=3"], "was 2.0, is now 3.0"),
                     (arguments + [f"--data={make_folder(tmp_path, n=9)}"], "is now 18 images"),
                     (arguments + [f"--teacher={trained}/student.pt"], "teacher")]
    for words, message in refusals:
        assert command(rb.run, words) == 2 and message in capfd.readouterr().err
    assert command(rb.run, arguments) == 0 and "epoch 3 of 3" in capfd.readouterr().out
    same(rb.read_file(out)[kind], rb.read_file(whole)[kind])
    assert not part.exists()

@pytest.mark.parametrize("part, classes, tolerance", [
    ("tuned", ("bee", "ant"), 1e-5), ("state", ("bee", "ant"), 1e-5),
    ("classifier", ("cow", "dog"), 1e-3)])
def test_two_processes_equal_one(part, classes, tolerance, trained, tmp_path):
    """Without dropout; what was dark is bright now, for large gradients. New classes: a probe."""
    make = partial(make_teacher, name=trained / "student.pt") if part == "state" else robustify
    flags = ["--data", make_folder(tmp_path / "data", classes), "--augment=augmix", "--lr=1e-3",
             "--recipe=apt", "--dropout=0", "--block-dropout=0"]
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    port = 20000 + os.getpid() % 40000
    pair = [forked(make(trained, two) + flags, rank, 2, port) for rank in (0, 1)]
    assert command(rb.run, make(trained, one) + flags) == 0
    for process in pair:
        process.join()
        assert process.exitcode == 0
    expected = rb.read_file(one)[part]
    for name, value in rb.read_file(two)[part].items():
        if not name.endswith("qkv.bias"):  # a key's bias has no gradient but rounding
            assert close(value, expected[name], tolerance), name

# Student, recipe, flags; @ is the folder of `trained`.
RUNS = """
    test_resnet:none three-heads --image-size=32 --rule=u |
    test_efficientnet:none three-heads --image-size=48 --fraction=0.5 |
    test-vit:none three-heads --zero-shot --augment=pixmix --mixing=@/data | test-rn:none lp |
    test-rn:none combined-head --augment=augmix+pixmix --mixing=@/data | @/student.pt vpt |
    @/student.pt single-teacher --head-blocks=2 --fraction=0.9 | test-vit:none apt --head-blocks=0 |
    @/student.pt apt --augment=none --limit=5 | test-vit:none vpt --prompts=3 |
    test_efficientnet:none ft --image-size=32 | test-rn:none ft --zero-shot | @/student.pt wise-ft |
    test_vit:none ft-augmented --image-size=48 | test-vit:none wise-ft | test-rn:none wise-ft-lc"""

@pytest.mark.parametrize("words", table(RUNS))
def test_command_lines_train_save_load_and_predict(words, trained, tmp_path, capsys):
    """One head predicts by an ordinary pass, and is at alpha 0 the original, to the bit."""
    out = tmp_path / "out.pt"
    student, recipe, *flags = words[0].replace("@", str(trained)).split()
    flags += [f"--student={student}", f"--recipe={recipe}"]
    assert command(rb.run, robustify(trained, out) + flags) == 0
    assert list(tmp_path.iterdir()) == [out]
    model = rb.load(out)
    x = images_of(5, model.size)
    found = model.predict(x)
    with torch.no_grad():
        z = model.backbone(x)
        original = model.original_top(z.clone())
        logits = {name: head(model.shared(z.clone())) for name, head in model.heads.items()}
        assert close(original, rb.load_original(out, rb.read_file(out))(x), 1e-4)
    assert tuple(found.phi) == rb.RECIPES[recipe].heads and model.class_names == ["ant", "bee"]
    assert not close(found.probabilities, original.softmax(-1), 1e-5)
    one_head = nn.ModuleList([model.shared, model.heads["combined"]])
    tuned = sum(p.numel() for p in one_head.parameters() if p.requires_grad)
    total = rb.count_parameters(model.backbone, model.original_top)
    printed = capsys.readouterr().out
    assert f"tuned {tuned / total:.1%}" in printed and f"--model {out}" in printed
    if len(logits) == 1:
        assert torch.equal(found.probabilities, logits["combined"].softmax(-1))
        assert found.uncertainty.tolist() == [0] * 5
    if recipe == "vpt":
        assert out.stat().st_size < 60_000
        return
    zero = rb.load(out, alpha=0)
    assert torch.equal(zero(x), original.softmax(-1)) or len(logits) == 3
    for name, value in rb.load(out, alpha=0.25).state_dict().items():
        expected = 0.75 * zero.state_dict()[name] + 0.25 * model.state_dict()[name]
        assert close(value.float(), expected.float()), name

def times_in(*folders):
    return {path: path.stat().st_mtime for folder in folders for path in folder.rglob("*")}

class Evil(str):
    def __reduce__(self):
        return os.mkdir, (str(self),)

# Flags -> part of the line; @ is the test's folder, $ that of `trained`, later flags win.
REFUSALS = """
    --data=@/nowhere -> nowhere | --data=@/flat -> needs images | --data=@/one -> one class |
    --data=@/hidden -> one class | --data=@/empty -> bee | --data=@/deep -> of folders |
    --data=@/parts -> of folders | --data=@/cows -> --teacher | --teacher= -> --make-teacher |
    --data=@/cows --recipe=apt -> cow/0.png | --teacher=@/no.pt -> --make-teacher |
    --data=@/numbers --student=test-vit:none --recipe=apt -> no word |
    --teacher=$/robust.pt -> a plug-in | --student=$/robust.pt -> a plug-in |
    --student=@/no.pt -> no such file | --student=@/lite0.pth -> NAME:FILE |
    --student=@/lite0.pt -> NAME: | --student=test_vit:@/lite0.pth -> Missing key |
    --student=test_resnet:@/no.pth -> no.pth | --student=@/evil.pt -> evil.pt |
    --student=test_resnet:@/evil.pth -> evil.pth | --student=resnet1 -> resnet1 |
    --student=hf-hub:timm/resnet18 -> no name of | --student=test_resnet:a1 -> a tag would be |
    --student=test-vit:tag -> tag | --student=test_convnext:none -> timm ConvNeXt |
    --student=test_resnet:none --image-size=32 --recipe=vpt -> timm ResNet | --rule=best -> kl-u |
    --student=test_vit:none --image-size=4 -> test_vit:none | --zero-shot -> no text encoder |
    --zero-shot --recipe=lp -> --recipe lp | --augment=none -> augmented | --dropout=0 -> dropout |
    --augment=pixmix -> --mixing | --augment=mixup -> augmix+pix | --recipe=ours -> three-heads |
    --wings -> --wings | --epochs=0 -> --epochs | --passes=ten -> --passes | --seed=-1 -> --seed |
    --make-teacher=test_vit:none -> --student or --make-teacher | --out=@ -> --out |
    --student= --teacher= -> --student or | --out=@/robust.pth -> NAME.pt |
    --student= --make-teacher=deit_tiny_distilled_patch16_224:none -> deit_tiny_distilled |
    --out=@/no/out.pt -> --out | --out=$/student.pt -> --out | --out=$/data/../teacher.pt -> --out |
    --batch-size=0 -> --batch-size | --resume --out=$/robust.pt -> is finished"""

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
    out, data = tmp_path / "out.pt", trained / "data/train"
    measure = f"eval.py --data {data} --model {out} --json {out}.json".split()
    for words in (["robustify.py"] + robustify(trained, out), measure):
        subprocess.run([sys.executable] + words, check=True, cwd=Path(rb.__file__).parent,
                       env={**os.environ, "CUDA_VISIBLE_DEVICES": GPUS})
    pixels, labels = images_and_labels(data)
    expected = (rb.load(out)(pixels).argmax(-1) == labels).float().mean().item()
    found = json.loads(Path(f"{out}.json").read_text())["cells"][0]["accuracy"]
    assert found["out: prediction"] == pytest.approx(expected, abs=0.13)  # 2 of 16, in bfloat16

# --- eval.py --------------------------------------------------------------------------------------

FIXED = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression",
         "gaussian_blur", "saturate")

def photograph(size=32):
    smooth = F.interpolate(noise(1, 3, 8, 8).sigmoid(), (size, size), mode="bilinear")[0]
    return (255 * smooth / smooth.max()).round().byte()

@pytest.fixture(scope="session")
def frost(tmp_path_factory):
    photos = {f"frost{i}.png": photograph(240 + i).permute(1, 2, 0).numpy() for i in range(1, 6)}
    return str(write_images(tmp_path_factory.mktemp("frost"), photos))

@pytest.mark.parametrize("name", ev.CORRUPTIONS)
def test_corruption_depends_on_seed_image_and_severity(name, frost):
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
    grey = torch.full((3, 64, 64), 128).byte()  # Poisson's variance is the mean
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

def test_glass_blur_is_a_loop_over_pixels(n=16, shift=3):
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
    x = F.pad(torch.ones(1, 1, 1), (15,) * 4)
    weights = np.exp(-np.arange(11)**2 / (2 * 3**2))
    expected = np.zeros((31, 31))
    expected[15, 15:4:-1] = np.floor(255 * weights / weights.sum())
    found = ev.motion_blur(x, radius=5, sigma=3, low=angle, high=angle + 1e-5)[0].numpy()
    assert 255 * (found.T if angle else found) == pytest.approx(expected, abs=0.01)

def test_zoom_blur_of_a_line(n=224):
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

RADIO, CLOCK, BANANA = [WNIDS[i] for i in (409, 530, 954)]  # two outputs mean a clock
FOLDERS = {"wnids": FISH, "numbers": ["1", "0", "2"], "names": ["ant", "bee"],
           "thousand": [str(i) for i in range(1000)], "objectnet": ["z_clock", "banana", "box"]}
MODELS = {"imagenet": WNIDS, "wnids": FISH[::-1] + [RADIO, CLOCK, BANANA], "names": ["bee", "ant"],
          "numbers": ["0", "1", "10", "2"], "unnamed": None, "clip": None,
          "zero-shot": ["ant", "bee", "cow"]}
CLOCKS = {"z_clock": {CLOCK, RADIO}, "banana": {BANANA}}
SAME = {name: {name} for name in FISH + ["ant", "bee", "0", "1", "2"]}
WNID = {str(i): {wnid} for i, wnid in enumerate(WNIDS)}
NO = "unknown"
GRID = {  # folder: what its classes mean to each of MODELS, or a word of the refusal
    "wnids": [SAME, SAME, NO, NO, NO, SAME, SAME], "thousand": [WNID, NO, NO, NO, NO, WNID, WNID],
    "numbers": [WNID, WNID, NO, SAME, NO, "no word", "no word"],
    "names": [NO, NO, SAME, NO, {"ant": {0}, "bee": {1}}, SAME, SAME],
    "objectnet": [CLOCKS, CLOCKS, NO, NO, NO, CLOCKS, CLOCKS]}

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
    args = ev.parse(["--data=x"])
    cell = ev.read_folder(tmp_path, "set", args)[0]
    assert len(cell.samples) == len(cell.classes) == len(FOLDERS[kind]) - (kind == "objectnet")
    monkeypatch.setattr(open_clip, "build_zero_shot_classifier", mock.MagicMock())
    monkeypatch.setattr(ev, "set_classes", mock.Mock())
    for model, expected in zip(MODELS, GRID[kind]):
        text = (mock.MagicMock(), None) if model in ("clip", "zero-shot") else None
        network = mock.Mock(text=text, classes=2, class_names=MODELS[model])
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
    """And large.pt of 48 px, undecided; three.pt, apt.pt, seed.pt of it, whose heads disagree."""
    root = shutil.copytree(trained, tmp_path_factory.mktemp("plug_ins"), dirs_exist_ok=True)
    shutil.copytree(root / "data/train", root / "data/val")
    images = (255 * images_of(32)).byte().permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(images):
        write_images(root, {f"mixed/{('ant', 'bee')[i % 3 > 0]}/{i}.png": image})
    network = randomise(rb.load_network("test_vit:none", 48))
    network.class_names, network.classifier = ["ant", "bee"], nn.Linear(network.net.num_features, 2)
    network.classifier.bias.data -= network(images_of(32)).mean(0)
    rb.save_network(network, root / "large.pt", rb.Config(make_teacher="any"))
    for name, settings in (("three", {}), ("seed", {"seed": 1}), ("apt", {"recipe": "apt"})):
        config = rb.Config(f"{root}/large.pt", f"{root}/large.pt", dropout=0.02, **settings)
        rb.save(differ(rb.cut(rb.load_network(config.student), config), 0.05), root / f"{name}.pt")
    return root

def test_layouts_of_published_corruptions(plug_ins, evaluate, tmp_path):
    """A corruption counts once, however many severities it has; thin cells are named."""
    whole, student = tmp_path / "in-c", ["--model", plug_ins / "student.pt", "--data"]
    for cell, wrong in (("fog/1", 0), ("fog/2", 0), ("fog/3", 1), ("blur/zoom_blur/1", 0),
                        ("blur/zoom_blur/2", 0)):
        for name, other in (("ant", "bee"), ("bee", "ant")):
            shutil.copytree(plug_ins / "data/val" / (other if wrong else name), whole / cell / name)
    (whole / "blur/zoom_blur/2/bee/0.png").unlink()
    _, _, table, text = evaluate(*student, whole)
    assert "zoom_blur 2" in text and "zoom_blur 3" in text and "mCE" not in table
    assert table["fog"] + table["zoom_blur"] + table["mean error"] == ["66.7", "100.0", "16.7"]
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
    samples = [("file", i) for i in range(len(right))]
    right = {("m", "prediction"): np.array(right, bool)}
    return ev.Cell("set", WNIDS, samples, corruption, severity, right=right)

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
    mce = np.mean([error[name] / ev.ALEXNET[name] for name in error])
    for limit, is_whole in ((50, False), (0, True), (0, False)):
        ev.report(folder, [column], ["m"], mock.Mock(limit=limit, json=None))
        printed = " ".join(capsys.readouterr().out.replace("|", " ").split())
        assert f"mean error {100 * sum(error.values()) / 15:.1f}" in printed
        assert (f"mCE {100 * mce:.1f}" in printed) == ("mCE" in printed) == is_whole
        folder[7].samples = folder[7].samples[is_whole:]

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
    """Are those of preprocess; published squares are seen as they are."""
    student = rb.load(plug_ins / "three.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    path = write_images(tmp_path, {"0.png": pixels}) / "0.png"
    cells = [ev.Cell("set", [], [(path, 0)], "contrast", 2, published) for published in (0, 1)]
    cells += [ev.Cell("set", [], [(path, 0)], wnids=wnids) for wnids in (None, {"ObjectNet": []})]
    views = ev.Views(cells, {32, 48}, mock.Mock(seed=0))
    made, published, clean, borderless = [item[0] for item in views]
    image = rb.read_image(path)
    for student.size in (32, 48):
        assert torch.equal(clean[student.size] / 255, student.preprocess(Image.open(path)))
    assert torch.equal(made[0], ev.corrupt(rb.centre_view(image, made_at), "contrast", 2))
    assert torch.equal(borderless[48], rb.centre_view(image[:, 2:-2, 2:-2], 48))
    assert torch.equal(published.get(0, image), image)
    assert (0 in published) == (size[0] == size[1])

@torch.no_grad()
def test_every_predictor(plug_ins, evaluate, monkeypatch):
    """One pass over models of several sizes against each alone; of one batch M_b runs once."""
    monkeypatch.chdir(plug_ins)
    backbones = []
    measure = ev.measure

    def spy(folder, columns, args):
        backbones.extend({column.model.backbone for column in columns if column.group})
        for backbone in backbones:
            backbone.forward = mock.Mock(side_effect=backbone.forward)
        return measure(folder, columns, args)

    monkeypatch.setattr(ev, "measure", spy)
    networks = ["large.pt", "test-vit:none"]
    _, found, table, _ = evaluate("--data", "mixed", "--average", "--alpha", 0, 0.5, 1, "--model",
                                  "three.pt", "seed.pt", "apt.pt", *networks)
    images, labels = images_and_labels("mixed")
    expected = {}

    def pixels(size):
        return torch.stack([rb.centre_view((255 * x).byte(), size) for x in images]) / 255

    answers = []
    for name, alpha in product(("three", "seed", "apt"), (0.0, 0.5, 1.0)):
        one = rb.load(f"{name}.pt", alpha=alpha).predict(pixels(48))
        right = {f"{head} head": phi.argmax(-1) == labels for head, phi in one.phi.items()}
        right["prediction"] = one.probabilities.argmax(-1) == labels
        if name != "apt":
            right["oracle"] = right["clean head"] | right["unclean head"]
            right["clean head chosen"] = one.head == 0
        expected.update({f"{name} alpha {alpha:g}: {key}": row for key, row in right.items()})
        answers.append(one.probabilities)
    for name in networks:
        network = rb.load_network(name)
        if network.text is not None:
            rb.set_classes(network, ["ant", "bee"], *rb.embed_text(network.text, ["ant", "bee"]))
        answers.append(network(pixels(network.size)).softmax(-1))
        expected[f"{name.removesuffix('.pt')}: prediction"] = answers[-1].argmax(-1) == labels
    expected["original: prediction"] = expected["large: prediction"]
    expected["average: prediction"] = sum(answers).argmax(-1) == labels
    for key, right in expected.items():
        assert found[f"{key} mixed"] == pytest.approx(right.float().mean().item()), key
    assert [backbone.forward.call_count for backbone in backbones] == [1]

def test_cost_transfer_and_plot(plug_ins, evaluate, tmp_path):
    """Of each recipe; a probe on what the original gives and what was tuned; a picture is drawn."""
    picture = tmp_path / "plot.png"
    draws = bool(ev.importlib.util.find_spec("matplotlib"))
    _, _, table, _ = evaluate(
        "--cost", "--transfer", plug_ins / "data", *["--plot", picture] * draws, "--corrupt", "fog",
        "--data", plug_ins / "mixed", "--model", plug_ins / "three.pt", plug_ins / "large.pt")
    assert picture.exists() == draws
    steps = {recipe: float(table[f"training step, {recipe}"][1]) for recipe in rb.RECIPES}
    assert 0.99 < steps["lp"] < steps["apt"] < steps["three-heads"] < steps["ft"] < 3.1
    assert 1 < float(table["inference, three-heads"][1]) < 2
    assert table["three, original"][0] == table["large, original"][0]
    assert float(table["three, tuned"][0]) > 90 and "+-" in table["three, tuned"][1]

REFUSED = """
    --data @/nowhere -> nowhere | --data @/cows -> cow | --data @/levels -> levels |
    --data @/objectnet -> mappings | --data -> --data | --model no.pt -> no.pt |
    --model @/apt.pt @/./apt.pt -> same | --model test_resnet:@/no.pth -> no.pth |
    --model @/apt.pt --rule u -> one head | --corrupt rain -> rain | --wings -> --wings |
    --corrupt frost -> --frost | --frost @/cows -> --frost | --severity 6 -> --severity |
    --frost @/cows --corrupt frost -> frost | --templates photo -> --templates | --json @ -> json |
    --templates {x}{} -> --templates | --templates {} -> --templates | --alpha 0.5 -> --alpha |
    --rule u -> --rule | --image-size 64 -> --image-size | --json @/student.pt -> student.pt |
    --cost -> --cost | --json @/data/out.json -> out.json | --plot @/student.pt -> student.pt |
    --transfer @/data -> train"""

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
