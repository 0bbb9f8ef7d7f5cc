"""Tests of robustify.py and eval.py, each against an independent oracle; no downloads, no GPU."""

import colorsys
import copy
import importlib.util
import io
import json
import math
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
from torch.distributions import Categorical, kl_divergence

import eval as ev
import robustify as rb

NARROW = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}  # a timm resnet18 of 0.02 M
RESNET = "resnet18", "none", 32, {**NARROW, "num_classes": 4}
NAMED = ["resnet18", "--model-args", json.dumps({**NARROW, "num_classes": 2})]
EVAL = ["--workers=0", "--device=cpu"]
FLAGS = [*EVAL, "--pretrained=none", "--image-size=32", "--epochs=1", "--batch-size=8", "--lr=1e-2"]
LINEAR = nn.Identity(), nn.Sequential()  # backbone and shared part before linear heads

def randomise(module, seed=0):
    """Random parameters and batch-norm statistics. A fresh network hides wrong wiring: its norms
    are the identity, its layer scales tiny, and torchvision's ViT has a classifier of zeros."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            spread = (p.shape[0] / p.numel()) ** 0.5 if p.ndim > 1 else 0.5
            p.copy_(spread * torch.randn(p.shape, generator=g) + 0.5 * (p.ndim == 1))
        for name, b in module.named_buffers():
            if "running" in name:  # mean, var
                b.copy_(torch.rand(b.shape, generator=g) + (0.5 if "var" in name else -0.5))
    return module.eval()

def images_of(n, size=32, seed=0):
    """Pixels in [0, 1], each image with its own colour and contrast."""
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(seed))
    return draw(n, 3, 1, 1) * 0.7 + 0.3 * draw(n, 1, 1, 1) * draw(n, 3, size, size)

def make_folder(root, classes=("ant", "bee"), parts=("train", "val"), n=8, size=32):
    """PART/CLASS/i.png, dark or bright by class, so that there is something to learn."""
    rng = np.random.default_rng(0)
    for folder in (root / part / name for part in parts for name in classes):
        folder.mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 128, (size, size, 3)) + 100 * (folder.name == classes[-1])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root

def make_student(**settings):
    """(student, teacher): narrow ResNets; two blocks frozen, one shared, one in each head."""
    student, teacher = (randomise(rb.load_network(*RESNET), seed) for seed in (0, 1))
    return rb.assemble(student, (2, 3), rb.Config(**settings)), teacher

def differ(student, amount=0.3):
    """Make the heads disagree, and the shared part another, as tuning would."""
    g = torch.Generator().manual_seed(0)
    for p in (*student.shared.parameters(), *student.heads.parameters()):
        p.data += amount * torch.randn(p.shape, generator=g) * p.data.abs().mean()
    return student

# --- 1. The split equals the whole network --------------------------------------------------------
@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Two tiny CLIPs that open_clip knows by name."""
    folder = tmp_path_factory.mktemp("clips")
    text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
    for name, vision in (("test-vit", dict(image_size=32, layers=2, width=64, patch_size=16)),
                         ("test-rn", dict(image_size=64, layers=[1, 2, 1, 1], width=8))):
        (folder / f"{name}.json").write_text(json.dumps(
            {"embed_dim": 32, "vision_cfg": {**vision, "head_width": 32}, "text_cfg": text}))
    open_clip.add_model_config(folder)

vit = partial(timm.create_model, img_size=32, depth=3, embed_dim=48, num_heads=3, num_classes=5)
tv_vit = partial(torchvision.models.VisionTransformer, image_size=32, patch_size=16, num_layers=3,
                 num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)
FAMILIES = {  # name: (size, tolerance, builder); nn.MultiheadAttention has a fast path, hence 1e-5
    "open_clip ViT": (32, 1e-5, lambda: open_clip.create_model("test-vit").visual),
    "open_clip RN": (64, 1e-5, lambda: open_clip.create_model("test-rn").visual),
    "timm ViT": (32, 0, lambda: vit("vit_tiny_patch16_224")),
    "average": (32, 0, lambda: vit("vit_tiny_patch16_224", global_pool="avg", fc_norm=False)),
    "no token": (32, 0, lambda: vit("vit_tiny_patch16_224", global_pool="avg", class_token=False)),
    "deit": (32, 0, lambda: vit("deit_tiny_patch16_224")),
    "timm ResNet": (32, 0, lambda: timm.create_model("resnet18", num_classes=5, **NARROW)),
    "timm ConvNeXt": (64, 0, lambda: timm.create_model(
        "convnext_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5)),
    "torchvision ViT": (32, 1e-5, tv_vit),
    "hidden layer": (32, 1e-5, lambda: tv_vit(representation_size=24)),
    "torchvision ResNet": (32, 0, lambda: torchvision.models.resnet18(num_classes=5))}

def whole_and_network(family):
    """(pixels -> logits by the library's own forward, Network of the same weights)."""
    size, _, build = FAMILIES[family]
    net, mean, std = randomise(build()), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    network = rb.Network(copy.deepcopy(net), size, mean, std, None, {}).eval()
    classifier = nn.Identity()
    if network.classifier is None:  # CLIP's towers have none of their own
        classifier = network.classifier = randomise(nn.Linear(32, 5))
    shift, scale = (torch.tensor(t)[:, None, None] for t in (mean, std))
    return (lambda x: classifier(net((x - shift) / scale))), network

@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_split_equals_whole(family, clips):
    (whole, network), (size, tolerance, _) = whole_and_network(family), FAMILIES[family]
    x = images_of(4, size)
    expected = whole(x)
    assert expected.shape == (4, 5)
    assert min((a - b).abs().max() for i, a in enumerate(expected) for b in expected[:i]) > 1e-3
    student = rb.assemble(network, rb.split(network, 0.3, 1), rb.Config())
    z = student.backbone(x)
    heads = [head(student.shared(z)) for head in student.heads.values()]
    assert len(heads) == 3
    for logits in (network(x), student.original(z), *heads):
        assert torch.allclose(logits, expected, atol=tolerance, rtol=tolerance)  # 0: to the bit

@pytest.mark.parametrize("family", ["open_clip RN", "timm ViT", "timm ConvNeXt"])
def test_split_is_the_best(family, clips):
    """K against a brute-force count by parameter name, and against what assemble tunes."""
    _, network = whole_and_network(family)
    sizes, chosen = {k: p.numel() for k, p in network.named_parameters()}, set()
    block_of = lambda k: int(k.split(".")[1]) if k.startswith("blocks.") else -1
    rest = sum(v for k, v in sizes.items() if k.startswith(("pool.", "classifier.")))
    for fraction, head_blocks in ((0.05, 1), (0.2, 0), (0.2, 1), (0.2, 2), (0.6, 1)):
        n = 1 + max(map(block_of, sizes)) - head_blocks
        tuned = [rest + sum(sizes[k] for k in sizes if block_of(k) >= i) for i in range(n + 1)]
        errors = [abs(t / sum(sizes.values()) - fraction) for t in tuned]
        k, found_n = rb.split(network, fraction, head_blocks)
        assert found_n == n and errors[k] == min(errors)
        student = rb.assemble(network, (k, n), rb.Config(recipe="apt"))  # apt has one head
        assert sum(p.numel() for p in student.parameters() if p.requires_grad) == tuned[k]
        chosen.add(k)
    assert len(chosen) > 1

# --- 2. Gradients, and what stays frozen ----------------------------------------------------------
IS_CLEAN = {"clean": [1, 1, 1, 1], "augmented": [0, 0, 0, 0], "mixed": [1, 0, 0, 1]}

@pytest.mark.parametrize("kind", IS_CLEAN)
def test_gradients_reach_their_parts(kind):
    (student, teacher), seen = make_student(), {}
    parts = {**student.train().heads, "original": student.original, "teacher": teacher}
    for name, part in parts.items():
        part.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: len(inputs[0])}))
    is_clean, labels = torch.tensor(IS_CLEAN[kind]).bool(), torch.arange(4)
    rb.student_loss(student, teacher, images_of(4), labels, is_clean).backward()
    clean = sum(IS_CLEAN[kind])
    rows = dict(clean=clean, original=clean, combined=4, unclean=4 - clean, teacher=4 - clean)
    assert {k: v for k, v in seen.items() if v} == {k: v for k, v in rows.items() if v}
    for name, part in {"shared": student.shared, **student.heads}.items():
        moved = [p.grad is not None and bool(p.grad.any()) for p in part.parameters()]
        assert moved and (all(moved) if rows.get(name, 4) else not any(moved)), name
    for part in (student.backbone, student.original, teacher):
        assert all(p.grad is None for p in part.parameters())

@pytest.mark.parametrize("tune", [False, True])
def test_training_leaves_the_frozen_alone(tune):
    student, teacher = make_student(tune_batch_norm=tune)
    frozen = {"backbone": student.backbone, "original": student.original, "teacher": teacher}
    parts = {**frozen, "shared": student.shared, **student.heads}
    before = {k: {n: t.clone() for n, t in v.state_dict().items()} for k, v in parts.items()}
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 1e-2)
    labels, is_clean = torch.arange(8) % 4, torch.arange(8) < 4
    for step in range(3):
        student.train()
        optimizer.zero_grad()
        rb.student_loss(student, teacher, images_of(8, seed=step), labels, is_clean).backward()
        optimizer.step()
    for name, part in parts.items():
        buffers = {k for k, _ in part.named_buffers()}
        assert any("running_mean" in k for k in buffers)
        for key, value in part.state_dict().items():
            stays = name in frozen or (key in buffers and not tune)
            assert torch.equal(value, before[name][key]) == stays, (name, key)

# --- 3. The loss ----------------------------------------------------------------------------------
def slow_loss(logits, targets, labels, is_clean, T, weight):
    """Eqs. 3-5, one example at a time; logits {head: (B, C)} of every row."""
    total = 0.0
    for i, label in enumerate(labels):
        for head in {"clean" if is_clean[i] else "unclean", "combined"} & set(logits):
            own = logits[head][i]
            total = total - Categorical(logits=own).log_prob(label)
            if targets is not None:
                total = total + weight * T**2 * kl_divergence(
                    Categorical(logits=targets[i] / T), Categorical(logits=own / T))
    return total / len(labels)

@pytest.mark.parametrize("kind", IS_CLEAN)
@pytest.mark.parametrize("T, weight", [(1.0, 1.0), (3.0, 0.4)])
def test_generalized_distillation(kind, T, weight):
    torch.manual_seed(0)
    is_clean, labels = torch.tensor(IS_CLEAN[kind]).bool(), torch.tensor([2, 0, 4, 1])
    logits, targets = {k: 3 * torch.randn(4, 5) for k in rb.HEADS}, 3 * torch.randn(4, 5)
    rows = {"clean": is_clean, "combined": is_clean | True, "unclean": ~is_clean}
    own = {k: v[rows[k]] for k, v in logits.items() if rows[k].any()}
    for teacher in (targets, None):
        found = rb.generalized_distillation(own, teacher, labels, is_clean, T, weight)
        assert torch.allclose(found, slow_loss(logits, teacher, labels, is_clean, T, weight))
    assert all(torch.equal(rb.examples_of(is_clean)[head], rows[head]) for head in rb.HEADS)

def test_distillation_is_kl_of_teacher_to_student():
    student, teacher = torch.tensor([[[4.0, 0.0, 0.0]], [[0.0, 1.0, 0.5]]])
    q, p = Categorical(logits=student / 2), Categorical(logits=teacher / 2)
    right, wrong = 4 * kl_divergence(p, q).sum(), 4 * kl_divergence(q, p).sum()
    assert abs(right - wrong) > 0.1  # the example tells the directions apart
    assert torch.allclose(rb.distillation(student, teacher, 2.0), right)

@pytest.mark.parametrize("recipe, taught", [("ours", True), ("apt", False)])
@torch.no_grad()
def test_student_loss_wires_both_teachers(recipe, taught):
    student, teacher = make_student(recipe=recipe, temperature=3.0, distill_weight=0.7)
    x, labels, is_clean = images_of(4), torch.tensor([3, 1, 0, 2]), torch.arange(4) % 2 == 0
    found = rb.student_loss(differ(student), teacher if taught else None, x, labels, is_clean)
    z = student.backbone(x)
    logits = {k: head(student.shared(z)) for k, head in student.heads.items()}
    assert set(logits) == (set(rb.HEADS) if taught else {"combined"})
    targets = torch.where(is_clean[:, None], student.original(z), teacher(x))
    expected = slow_loss(logits, targets if taught else None, labels, is_clean, 3.0, 0.7)
    assert torch.allclose(found, expected, rtol=1e-4)

@torch.no_grad()
def test_teacher_loss():
    network, labels = randomise(rb.load_network(*RESNET)), torch.tensor([0, 3])
    views, plain, jsd = images_of(6).reshape(2, 3, 3, 32, 32), 0.0, 0.0
    for example, label in zip(views, labels):
        logits = [network(view[None])[0] for view in example]
        plain -= Categorical(logits=logits[0]).log_prob(label) / 2
        mixture = Categorical(probs=sum(v.softmax(-1) for v in logits) / 3)
        jsd += sum(kl_divergence(Categorical(logits=v), mixture) for v in logits) / 6
    assert jsd > 1e-4
    for x, expected in ((views, plain + 12 * jsd), (views[:, 0], plain)):
        assert torch.allclose(rb.teacher_loss(network, 12.0, x, labels), expected, rtol=1e-4)

# --- 4. to 6. Head selection ----------------------------------------------------------------------
def test_kl_divergence():
    torch.manual_seed(0)
    p, q = torch.randn(2, 6, 5).softmax(-1)
    assert torch.allclose(rb.kl_divergence(p, q), atol=1e-6, other=kl_divergence(
        Categorical(probs=p), Categorical(probs=q)))
    one, other = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 0.5, 0.5]])
    assert rb.kl_divergence(one, one) == 0 and 80 < rb.kl_divergence(one, other) < math.inf
    half, third = torch.tensor([[0.5, 0.5, 0]]), torch.full((1, 3), 1 / 3)  # 0 log 0 is 0
    assert rb.kl_divergence(half, third).item() == pytest.approx(math.log(1.5))

def test_mc_dropout_is_a_loop_over_masks():
    torch.manual_seed(0)
    classifier, features = nn.Linear(16, 3), torch.randn(4, 16)
    masks = (torch.rand(7, 16) < 0.8) / 0.8
    phi, uncertainty = rb.mc_dropout(classifier, features, masks)
    for i, f in enumerate(features):
        passes = np.array([classifier(f * mask).softmax(-1).tolist() for mask in masks])
        mean, deviation = passes.sum(0) / 7, passes.std(0, ddof=0)
        assert phi[i].tolist() == pytest.approx(mean.tolist(), abs=1e-6)
        assert uncertainty[i].item() == pytest.approx(deviation.mean(), abs=1e-6)

def test_mask_variance_has_its_closed_form():
    """Inverted dropout before a linear layer: mean w f, variance p / (1 - p) * sum w^2 f^2."""
    torch.manual_seed(0)
    p, head, f = 0.3, nn.Linear(64, 6), torch.randn(8, 64)
    student = rb.RobustStudent(*LINEAR, head, rb.Config(passes=4000, dropout=p))
    logits = head(f[:, None] * student.masks).double()  # (B, K, C)
    closed = p / (1 - p) * (f**2 @ head.weight.T**2).double()
    ratio = logits.var(1, correction=0) / closed
    assert ratio.mean().item() == pytest.approx(1, abs=0.05)
    assert ((logits.mean(1) - head(f)).abs() < 5 * (closed / 4000).sqrt()).all()

@pytest.mark.parametrize("mc", ["head", "tuned"])
def test_predict_repeats_itself(mc):
    student, x = differ(make_student(mc=mc, dropout=0.4)[0]), images_of(6)
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), student.predict(x)
    assert torch.equal(torch.get_rng_state(), state)  # it does not disturb others' numbers either
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], student.predict(x)[:3]))
    assert first.uncertainty.min() > 0 and torch.equal(student(x), first.probabilities)
    for i in range(6 if mc == "head" else 0):  # independent of the batch
        alone = student.predict(x[i:i + 1])
        assert torch.allclose(alone.probabilities[0], first.probabilities[i], atol=1e-6)

def test_select_head_rules():
    """Images: 'u' and 'kl-u' disagree; a tie; KL(m || k) and KL(k || m) disagree."""
    phi = {"combined": torch.tensor([[.5, .5, 0], [.5, .5, 0], [.4, .4, .2]]),
           "clean": torch.tensor([[.6, .4, 0], [.7, .3, 0], [.8, .1, .1]]),
           "unclean": torch.tensor([[.9, .1, 0], [.7, .3, 0], [.5, .499, .001]])}
    u = {"clean": torch.tensor([.3, .2, .1]), "unclean": torch.tensor([.1, .2, .1]),
         "combined": torch.zeros(3)}
    # kl-u: .3 * .02 < .1 * .51; a tie; .1 * .42 < .1 * .88, though KL(k || m) is .35 > .22
    names = lambda *args: "".join(rb.HEADS[i][0] for i in rb.select_head(*args))
    mirror = lambda of: {**of, "clean": of["unclean"], "unclean": of["clean"]}
    for rule, expected, mirrored in (("kl-u", "ccc", "ucu"), ("kl", "ccc", "ucu"),
                                     ("u", "ucc", "ccc"), ("confidence", "ucc", "ccu")):
        assert names(phi, u, rule) == expected, rule
        assert names(mirror(phi), mirror(u), rule) == mirrored, rule  # ties stay clean

@pytest.mark.parametrize("rule", ["kl-u", "u", "kl", "confidence"])
@torch.no_grad()
def test_predict_returns_the_chosen_head(rule):
    torch.manual_seed(0)
    x, linear = torch.randn(64, 16), nn.Linear(16, 4)
    student = differ(rb.RobustStudent(*LINEAR, linear, rb.Config(rule=rule)), 1.0)
    spread = {k: rb.mc_dropout(h.classifier, x, student.masks) for k, h in student.heads.items()}
    phi, uncertainty = ({k: v[i] for k, v in spread.items()} for i in (0, 1))
    found = student.predict(x, with_original=True)
    assert torch.equal(found.head, rb.select_head(phi, uncertainty, rule))
    assert len(set(found.head.tolist())) == 2  # each head is chosen by some image
    for i, index in enumerate(found.head):
        assert torch.allclose(found.probabilities[i], phi[rb.HEADS[index]][i])
        assert torch.allclose(found.uncertainty[i], uncertainty[rb.HEADS[index]][i])
    assert torch.equal(found.everyone["selected"], found.probabilities)
    assert torch.allclose(found.everyone["original"], linear(x).softmax(-1))

# --- 7. CLIP: zero-shot and visually encoded ------------------------------------------------------
def plain_clip():
    """The CLIP whose weights load_network draws from its seed, and its class embeddings by hand."""
    torch.manual_seed(0)
    clip, tokenize = open_clip.create_model("test-vit").eval(), open_clip.get_tokenizer("test-vit")
    def embed(names):  # one class at a time, as Sec. 4.4 says
        texts = [tokenize([t(n) for t in open_clip.OPENAI_IMAGENET_TEMPLATES]) for n in names]
        encoded = [F.normalize(clip.encode_text(t), dim=-1).mean(0) for t in texts]
        return F.normalize(torch.stack(encoded), dim=-1).detach()
    return clip, embed

def clip_student(trained, names=("ant", "bee", "cat")):
    network = rb.load_network("test-vit", "none")
    network.class_names = list(names)
    network.classifier = rb.CosineClassifier(*network.text_embeddings(names), trained)
    return network, rb.assemble(network, (1, 1), rb.Config(
        student="test-vit", pretrained="none", zero_shot=not trained, dropout=0.3))

@torch.no_grad()
def test_clip_logits_by_hand(clips):
    (network, student), (clip, embed), x = clip_student(False), plain_clip(), images_of(4)
    shift, scale = (torch.tensor(clip.visual.preprocess_cfg[k])[:, None, None]
                    for k in ("mean", "std"))
    encoded = F.normalize(clip.encode_image((x - shift) / scale), dim=-1)
    expected = clip.logit_scale.exp() * encoded @ embed(["ant", "bee", "cat"]).T
    assert expected.std(0).min() > 1e-3 and expected.std(1).min() > 1e-3
    z = student.backbone(x)
    for logits in (network(x), student.original(z), student.heads["clean"](student.shared(z))):
        assert torch.allclose(logits, expected, atol=1e-4)
    turned = clip_student(False, ("cat", "ant", "bee"))[1]
    assert torch.allclose(turned(x), student(x)[:, [2, 0, 1]], atol=1e-5)
    assert not torch.allclose(turned(x), student(x), atol=1e-4)
    # ImageNet's folder names stand for its class names, underscores for blanks.
    found = network.text_embeddings(["n01440764", "great_auk"])[0]
    assert torch.allclose(found, embed(["tench", "great auk"]), atol=1e-5)

@pytest.mark.parametrize("trained", [False, True])
def test_clip_classifier_is_tuned_in_ve_alone(trained, clips):
    student, teacher = clip_student(trained)[1].train(), clip_student(True)[0]
    rb.student_loss(student, teacher, images_of(3), torch.arange(3),
                    torch.tensor([True, False, True])).backward()
    for head in student.heads.values():
        parameters = dict(head.named_parameters())
        assert ("classifier.weight" in parameters) == trained and len(parameters) > 5
        assert (head.classifier.weight.grad is not None) == trained
        assert all(p.grad is not None for p in parameters.values())

def test_clip_takes_new_classes(clips, tmp_path):
    names, x = ["dog", "bee", "elk", "fox", "gnu"], images_of(4)
    student = differ(clip_student(False)[1], 0.1)
    rb.save(student, tmp_path / "zs.pt")
    loaded = rb.load(tmp_path / "zs.pt", class_names=names)
    for head in student.heads.values():  # the tuned heads, their words swapped by hand
        head.classifier = rb.CosineClassifier(plain_clip()[1](names), head.classifier.scale, False)
    assert torch.allclose(loaded(x), student(x), atol=1e-5) and loaded(x).shape == (4, 5)
    assert list(loaded.class_names) == names

def test_clip_from_a_file_stays_that_clip(clips, trained, tmp_path):
    """Trained whole and read back: its text encoder is the file's, and it takes new classes."""
    torch.manual_seed(7)
    clip, weights, out = open_clip.create_model("test-vit").eval(), tmp_path / "a.bin", "net.pt"
    torch.save(clip.state_dict(), weights)
    flags = ["--data", str(trained / "data"), "--augment", "none", "--out", str(tmp_path / out)]
    assert rb.main(["--make-teacher", f"test-vit:{weights}", *FLAGS[:2], *FLAGS[4:], *flags]) == 0
    network, names = rb.load_network(str(tmp_path / out)), ["dog", "elk", "fox"]
    expected = open_clip.build_zero_shot_classifier(
        clip, open_clip.get_tokenizer("test-vit"), names, open_clip.OPENAI_IMAGENET_TEMPLATES).T
    assert torch.allclose(network.text_embeddings(names)[0], expected, atol=1e-6)
    rb.name_classes(network, names)
    assert network.eval()(images_of(2)).shape == (2, 3)

@torch.no_grad()
def test_quick_gelu_follows_the_tag(clips, monkeypatch):
    """OpenAI's weights need QuickGELU, though the plain name of the architecture says GELU."""
    assert open_clip.get_pretrained_cfg("ViT-L-14", "openai")["quick_gelu"]
    make = open_clip.create_model
    spy = Mock(side_effect=lambda *args, **kwargs: make(*args, **{**kwargs, "pretrained": None}))
    monkeypatch.setattr(open_clip, "create_model", spy)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda _, tag: {"quick_gelu": tag == "q"})
    quick, plain = (rb.load_network("test-vit", t).features(images_of(2)) for t in ("q", "plain"))
    asked = [(c.kwargs["pretrained"], c.kwargs["force_quick_gelu"]) for c in spy.mock_calls]
    assert asked == [("q", True), ("plain", False)] and (quick - plain).abs().max() > 1e-4

# --- 8. Views -------------------------------------------------------------------------------------
@pytest.fixture
def samples(tmp_path):
    """Twelve images whose label is their index."""
    paths = make_folder(tmp_path / "views", parts=["all"], n=6, size=40).glob("all/*/*.png")
    return [(str(path), i) for i, path in enumerate(sorted(paths))]

def test_views_depend_on_seed_epoch_and_index_alone(samples):
    views, runs = rb.Views(samples, 32, "coin", rb.Config(seed=3)), {}
    for workers, epoch in ((0, 0), (0, 1), (2, 0), (2, 1)):
        torch.manual_seed(workers)
        batches = rb.loader(views, rb.Config(seed=3, batch_size=5, workers=workers), epoch)
        runs[workers, epoch] = [torch.cat(column) for column in zip(*batches)]
        assert len(set(runs[workers, epoch][1].tolist())) == 10  # whole batches only
    for epoch in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(runs[0, epoch], runs[2, epoch]))
    assert not torch.equal(runs[0, 0][1], runs[0, 1][1])  # shuffled anew
    pixels, order, is_clean, _ = runs[2, 1]
    for place in order.argsort():  # one by one, in another order
        item = views[int(order[place])]
        assert torch.equal(item[0], pixels[place]) and item[2] == is_clean[place]
    first, other = [views[i][0] for i in range(12)], rb.Views(samples, 32, "coin", rb.Config())
    views.epoch, other.epoch = 0, 1
    for another in (views, other):  # another epoch; another seed
        assert sum(not torch.equal(another[i][0], first[i]) for i in range(12)) > 6

def test_views_coin_is_fair_and_clean_items_are_clean(samples):
    views, plain = (rb.Views(samples * 34, 8, "coin", rb.Config(augment=augment))
                    for augment in ("augmix+deepaugment", "none"))
    items = [(views[i], plain[i]) for i in range(400)]
    assert 160 <= sum(v[2] for v, _ in items) <= 240  # four standard deviations
    same = [(v[2], torch.equal(v[0], p[0])) for v, p in items]
    assert (True, False) not in same and same.count((False, False)) > 100
    # From the fifth on, these are augmented already, and never count as clean.
    extra = rb.Views(samples * 34, 8, "coin", rb.Config(), 5)
    assert [extra[i][2] for i in range(99)] == [plain[i][2] and i < 5 for i in range(99)]

def test_views_triple(samples):
    views = rb.Views(samples, 32, "triple", rb.Config())
    pixels = views[0][0]
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 3, 32, 32)
    assert not torch.equal(pixels[1], pixels[2])
    assert views.augmix.all_ops is False  # or it would train on ImageNet-C's corruptions

def test_views_replace_unreadable_images(samples):
    for broken in (4, 11):
        path = Path(samples[broken][0])
        path.write_bytes(path.read_bytes()[:300])
    views = rb.Views(samples, 32, "centre", rb.Config(workers=0))
    for broken, heir in ((4, 5), (11, 0)):
        pixels, label, _, unreadable = views[broken]
        assert (label, unreadable) == (heir, broken) and torch.equal(pixels, views[heir][0])
    batch, = rb.loader(views, views.config)
    assert batch[3].tolist() == [i if i in (4, 11) else -1 for i in range(12)]
    for path, _ in samples:
        Path(path).write_bytes(b"")
    with pytest.raises(rb.Refusal, match="png"):
        views[0]

def test_unreadable_test_image_is_named(trained, tmp_path, capsys):
    root, out = make_folder(tmp_path / "data"), tmp_path / "out.pt"
    (root / "val/bee/3.png").write_bytes(b"no image")
    for main, flags in ((ev.main, ["--model", str(trained / "student.pt"), *EVAL]),
                        (rb.main, ["--make-teacher", *NAMED, *FLAGS, "--out", str(out)])):
        assert main(["--data", str(root), *flags]) == 2  # to skip it would change the score
        assert "bee/3.png" in capsys.readouterr().err.splitlines()[-1] and not out.exists()

def test_no_readable_image_at_all(tmp_path, capsys):
    root = make_folder(tmp_path / "data", parts=["train"])
    for path in root.glob("train/*/*.png"):
        path.write_bytes(b"")
    assert rb.main(["--make-teacher", *NAMED, *FLAGS, "--data", str(root), "--workers=1", "--out",
                    str(tmp_path / "out.pt")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # found by a worker, told as anywhere else
    assert line.startswith(f"robustify.py: {root}") and "none of the images" in line

def test_noise2net():
    image = images_of(1)[0]
    one, again, other = (torch.manual_seed(s) and rb.noise2net(image) for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == image.shape and 0 <= one.min() and one.max() <= 1
    assert (one - image).abs().mean() > 0.02

# --- 9. Checkpoints -------------------------------------------------------------------------------
def own_modules():
    block = lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    parts = {"backbone": nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)),
             "shared": nn.Sequential(block(), block()),
             "head": nn.Sequential(block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))}
    return {k: randomise(v) for k, v in parts.items()}

@pytest.mark.parametrize("own", [False, True])
def test_checkpoint_round_trip(own, tmp_path):
    config = rb.Config(passes=3, rule="u", extra_data=("a", "b"), seed=5)
    student = rb.RobustStudent(**own_modules(), config=config)
    if not own:  # the random weights come back from the seed
        config.student, config.pretrained, config.image_size, config.model_args = RESNET
        network = rb.load_network(*RESNET, seed=5)
        network.class_names = list("abcd")
        student = rb.assemble(network, (2, 3), config)
    rb.save(differ(student), tmp_path / "robust.pt")
    loaded = rb.load(tmp_path / "robust.pt", **(own_modules() if own else {}))
    expected, found = (s.predict(images_of(4), with_original=True) for s in (student, loaded))
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3]))
    assert all(torch.equal(found.everyone[name], p) for name, p in expected.everyone.items())
    assert not torch.equal(expected.everyone["clean"], expected.everyone["original"])
    assert loaded.config == config and (own or list(loaded.class_names) == list("abcd"))

def test_another_network_is_refused(tmp_path):
    """A buffer of the backbone counts, and a weight of the original's tail."""
    for part, change in (("backbone", lambda p: p["backbone"][1].running_mean),
                         ("head", lambda p: p["head"][3].weight[0])):
        parts, path = own_modules(), tmp_path / f"{part}.pt"
        student = rb.RobustStudent(**parts)
        rb.save(student, path)
        change(parts).data[0] += 1e-3
        with pytest.raises(rb.Refusal) as refused:
            rb.load(path, **parts)
        before, after = (rb.fingerprint(s) for s in (rb.load(path, **own_modules()),
                                                     rb.RobustStudent(**parts)))
        assert before != after and all(f[:12] in str(refused.value) for f in (before, after))

class Evil(str):
    """Unpickling it makes the folder of this name."""
    def __reduce__(self):
        return os.mkdir, (str(self),)

def test_broken_and_malicious_checkpoints_are_refused(tmp_path):
    path, trap, rng = tmp_path / "robust.pt", tmp_path / "trap", np.random.default_rng(0)
    pickle.loads(pickle.dumps(Evil(trap)))
    assert trap.is_dir()  # the attack works
    trap.rmdir()
    contents = [pickle.dumps(Evil(trap)), rng.bytes(50), rng.bytes(5000), b"hello\n", b"aaaa"]
    for zipped in (True, False):
        whole, evil = io.BytesIO(), io.BytesIO()
        for content, file in ((torch.ones(99), whole), (Evil(trap), evil)):
            torch.save({"tuned": content}, file, _use_new_zipfile_serialization=zipped)
        cuts = np.linspace(0, len(whole.getvalue()), 20).astype(int)  # whole, but not ours
        contents += [evil.getvalue(), *(whole.getvalue()[:n] for n in cuts)]
    for content in contents:
        path.write_bytes(content)
        for read in (lambda: rb.load(path, **own_modules()), lambda: rb.load_network(str(path))):
            with pytest.raises(rb.Refusal, match="robust.pt"):
                read()
    assert not trap.exists()

def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.pt"
    rb.write_tensors({"a": torch.ones(3)}, path)
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        rb.write_tensors({"a": torch.zeros(3)}, path)
    assert torch.equal(rb.read_tensors(path)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["file.pt"]

# --- 10. Corruptions ------------------------------------------------------------------------------
def photographs(n, size=32):
    smooth = F.interpolate(images_of(n, 8), (size, size), mode="bilinear")
    return (255 * smooth / smooth.amax((1, 2, 3), keepdim=True)).round().byte()

RANDOM = ("glass_blur", "motion_blur", "snow", "frost", "fog", "elastic_transform")

@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", ev.CORRUPTIONS)
def test_corruption(name, size, tmp_path):
    images, change, frost = photographs(4, size), {}, str(tmp_path)
    for i in range(1, 7):  # the sixth photo is never drawn
        shade = np.random.default_rng(i).integers(0, 255 if i < 6 else 1, (400, 500, 3))
        Image.fromarray(shade.astype(np.uint8)).save(tmp_path / f"frost{i}.png")
    for severity in (1, 5):
        together = ev.corrupt(images, name, severity, range(10, 14), 1, frost)
        assert together.shape == images.shape and together.dtype == torch.uint8
        for i in (0, 3):
            alone = ev.corrupt(images[i:i + 1], name, severity, [10 + i], 1, frost)
            assert torch.equal(alone[0], together[i])
        change[severity] = (together.float() - images.float()).abs().mean((1, 2, 3))
        assert change[severity].min() > 0
    # These two have no order as published: saturate first takes colour away and then adds some.
    assert change[5].mean() > change[1].mean() or name in ("saturate", "elastic_transform")
    moved = ev.corrupt(images, name, 5, range(20, 24), 1, frost)
    random = name.endswith("noise") or name in RANDOM
    assert torch.equal(moved, together) != random  # random ones alone depend on the index

def test_corruption_closed_forms():
    images, c = photographs(4), {k: v[32] for k, (_, v) in ev.CORRUPTIONS.items()}
    for i in (0, 2, 4):
        bright, flat, jpeg = (ev.corrupt(images, name, i + 1, range(4)).permute(0, 2, 3, 1).numpy()
                              for name in ("brightness", "contrast", "jpeg_compression"))
        x = images.permute(0, 2, 3, 1).numpy()
        for pixel, found in zip(x.reshape(-1, 3)[::5], bright.reshape(-1, 3)[::5]):
            h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
            expected = 255 * np.array(colorsys.hsv_to_rgb(h, s, min(v + c["brightness"][i], 1)))
            assert np.abs(found - expected).max() <= 1.001
        mean = x.mean((1, 2), keepdims=True)
        assert np.abs(flat - (x - mean) * c["contrast"][i] - mean).max() <= 1.001
        for image, found in zip(x, jpeg):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=c["jpeg_compression"][i])
            assert np.array_equal(found, np.asarray(Image.open(buffer)))

def test_noise_statistics():
    grey, x = torch.full((4, 3, 64, 64), 128).byte(), 128 / 255
    for name, deviation in (("gaussian_noise", lambda c: c), ("speckle_noise", lambda c: x * c),
                            ("shot_noise", lambda c: (x / c) ** 0.5),
                            ("impulse_noise", lambda c: c**0.5 / 2)):
        noisy = ev.corrupt(grey, name, 3, range(4)) / 255
        assert abs(noisy.mean() - x) < 0.004  # half a level is lost where noise is truncated
        expected = deviation(ev.CORRUPTIONS[name][1][64][2])
        assert noisy.std().item() == pytest.approx(expected, rel=0.03)

# --- 11. Metrics and data layouts -----------------------------------------------------------------
def test_mce_by_hand():
    rng, key, group, rows, error = np.random.default_rng(0), ("m", "model"), [], [], {}
    for name, severity in [("", 0)] + [(name, s) for name in ev.ALEXNET for s in (1, 2, 3, 4, 5)]:
        rows.append({key: rng.random(50) < 0.8 - 0.05 * severity})
        group.append(SimpleNamespace(name=name, corruption=name, severity=severity, made=False))
        error.setdefault(name, []).append(sum(not right for right in rows[-1][key]) / 50)
    mean = {name: sum(values) / len(values) for name, values in error.items()}
    clean, alexnet = mean.pop(""), 1 - 0.56522  # torchvision's published accuracy of AlexNet
    lines = dict(ev.summary(list(zip(group, rows)), [key], clean=rows[0]))
    assert lines["mCE"] == pytest.approx(sum(mean[n] / ev.ALEXNET[n] for n in mean) / 15)
    assert lines["relative mCE"] == pytest.approx(
        sum((mean[n] - clean) / (ev.ALEXNET[n] - alexnet) for n in mean) / 15)
    fewer = dict(ev.summary(list(zip(group, rows))[:-5], [key]))  # mCE is defined over all fifteen
    assert "mCE" not in fewer and lines["fog"] == fewer["fog"] == pytest.approx(1 - mean["fog"])

def test_columns():
    column = lambda classes, names, n: ev.columns(ev.Shift("set", [], classes), names, n, "mine")
    numbers = ["0", "1", "10", "100"]  # ImageNetV2: the name is the index, whatever its place
    for classes, names, outputs, expected in (
            (["b", "c"], ["a", "b", "c"], 3, [1, 2]), (numbers, [], 1000, [0, 1, 10, 100]),
            (numbers, [f"n{i}" for i in range(1000)], 1000, [0, 1, 10, 100]),
            (["0", "2"], ["0", "1", "10", "2"], 4, [0, 3]),  # but these are names
            (["c", "a"], ["a", "b", "c"], 3, [2, 0])):
        assert column(classes, names, outputs) == [[i] for i in expected]
    for classes, names in ((["dog"], ["ant", "bee"]), (["7"], ["ant", "bee"]), (["ant"], [])):
        with pytest.raises(rb.Refusal, match="mine"):
            column(classes, names, 2)

WNIDS = timm.data.ImageNetInfo("imagenet-1k").label_names()

class Reader(nn.Module):
    """A stand-in for an ImageNet network of 32 px whose two best classes are written in the top
    left pixel of an image: it tells whether that pixel and its label arrive where they should."""
    size, class_names, text_embeddings = 32, None, None

    def __init__(self, outputs=1000):
        super().__init__()
        self.classifier = nn.Linear(1, outputs)

    def predict(self, pixels, with_original=False):
        digits = (pixels[:, :, 0, 0] * 255).round().long()
        best = (digits * torch.tensor([65536, 256, 1])).sum(1)
        p = torch.zeros(len(best), 1000)
        p[range(len(best)), best % 1000] = 0.3
        p[range(len(best)), best // 1000] = 0.7
        p = p[:, :len(self.classifier.weight)]
        return rb.Prediction(p, None, None, {"model": p})

def written(first, second=999):
    """(32, 32, 3) uint8, of which Reader reads these two classes."""
    code = first * 1000 + second
    return np.full((32, 32, 3), (code >> 16, code >> 8 & 255, code & 255), np.uint8)

def measured_by_reader(monkeypatch, tmp_path, folders, *flags, outputs=1000):
    """The sets of --json after eval.py has met these folders of images {path: pixels}."""
    for path, pixels in folders.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / path)
    monkeypatch.setattr(ev, "load_network", lambda *args: Reader(outputs))
    data = dict.fromkeys(str(tmp_path / Path(path).parts[0]) for path in folders)
    assert ev.main([*EVAL, "--data", *data, "--model", "reader", "--json",
                    str(tmp_path / "out.json"), *flags]) == 0
    return {s["name"]: s for s in json.loads((tmp_path / "out.json").read_text())["sets"]}

def test_imagenet_layouts(monkeypatch, tmp_path, capsys):
    sets = measured_by_reader(monkeypatch, tmp_path, {
        # ImageNet-R, -A: the best class of all may be outside of the subset
        f"in-r/{WNIDS[5]}/0.png": written(5), f"in-r/{WNIDS[5]}/1.png": written(6, 5),
        f"in-r/{WNIDS[9]}/0.png": written(9), f"in-r/{WNIDS[9]}/1.png": written(5, 9),
        # ImageNet-V2: sorted as text, 100 comes before 2
        **{f"v2/{i}/0.png": written(i) for i in (0, 1, 2, 10)}, "v2/100/0.png": written(3),
        # Sketch, and ImageNet itself, are all classes or some of them
        f"sketch/{WNIDS[999]}/0.png": written(999, 0), f"sketch/{WNIDS[0]}/0.png": written(1, 0),
        **{f"in-c/{c}/{s}/{WNIDS[i]}/0.png": written(i if i < right else 8, 7)
           for c, right in (("fog", 2), ("snow", 3)) for s in (1, 4) for i in range(4)}})
    found = {name: (s["n"], s["classes"], s["accuracy"]["reader"]) for name, s in sets.items()}
    assert found == {
        "in-r": (4, 2, {"model": 0.75, "model of all": 0.5}),
        "v2": (5, 5, {"model": 0.8, "model of all": 0.8}),
        "sketch": (2, 2, {"model": 1.0, "model of all": 0.5}),
        **{f"in-c/{c}/{s}": (4, 4, {"model": share, "model of all": share})
           for c, share in (("fog", 0.5), ("snow", 0.75)) for s in (1, 4)}}
    # Tables 1 to 3 end with the mean over the four shifts, of which in-c counts 62.5 %.
    assert "| average of 4 shifts |   79.4 |" in capsys.readouterr().out

def test_objectnet_layout(monkeypatch, tmp_path):
    """Labels are sorted; two outputs mean a clock; a box is no ImageNet class; a border of 1 px,
    smeared over 2, is no part of the photo."""
    framed = lambda *classes: np.pad(written(*classes), ((2, 2), (2, 2), (0, 0)))
    for name, content in (("folder_to_objectnet_label", {"z_clock": "Alarm clock", "box": "Box",
                                                         "banana": "Banana"}),
                          ("imagenet_pytorch_id_to_objectnet_id", {"409": 0, "530": 0, "954": 1})):
        (tmp_path / "on/mappings").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"on/mappings/{name}.json").write_text(json.dumps(content))
    on, = measured_by_reader(monkeypatch, tmp_path, {
        "on/images/z_clock/0.png": framed(530), "on/images/z_clock/1.png": framed(409),
        "on/images/z_clock/2.png": framed(1, 954), "on/images/box/0.png": framed(954),
        "on/images/banana/0.png": framed(700, 954), "on/images/banana/1.png": framed(954, 409)
    }).values()
    assert (on["n"], on["classes"]) == (5, 2)  # the box does not count
    assert on["accuracy"]["reader"] == {"model": 0.8, "model of all": 0.6}

def test_cifar_c_arrays(monkeypatch, tmp_path):
    (tmp_path / "c10-c").mkdir()
    labels = np.arange(50) % 10
    for name, wrong in (("fog", 4), ("jpeg_compression", 7)):  # severity 2 of 10 images, 4 wrong
        images = np.stack([written(i if not 10 <= n < 10 + wrong else (i + 1) % 10)
                           for n, i in enumerate(labels)])
        np.save(tmp_path / f"c10-c/{name}.npy", images)
    np.save(tmp_path / "c10-c/labels.npy", labels)
    sets = measured_by_reader(monkeypatch, tmp_path, {"c10-c/unused.png": written(0)}, outputs=10)
    assert {name: (s["n"], s["accuracy"]["reader"]["model"]) for name, s in sets.items()} == {
        f"c10-c/{name}/{s}": (10, share if s == 2 else 1.0)
        for name, share in (("fog", 0.6), ("jpeg_compression", 0.3)) for s in (1, 2, 3, 4, 5)}
    monkeypatch.setattr(ev, "load_network", lambda *args: Reader())
    assert ev.main([*EVAL, "--data", str(tmp_path / "c10-c"), "--model", "imagenet"]) == 2

def test_corrupted_folder_is_the_memory_written_down(trained, tmp_path):
    """--corrupt-to writes ImageNet-C's layout, which measures as --corrupt does in memory."""
    base, sets = ["--data", str(trained / "data"), *EVAL], {}
    corrupt = ["--corrupt", "gaussian_noise", "pixelate", "--severity", "2", "5"]
    assert ev.main([*base, *corrupt, "--corrupt-to", str(tmp_path / "data")]) == 0
    for name, flags in (("memory", [*base, *corrupt]),
                        ("files", ["--data", str(tmp_path / "data"), *EVAL])):
        file = tmp_path / f"{name}.json"
        assert ev.main([*flags, "--json", str(file), "--model", str(trained / "robust.pt")]) == 0
        sets[name] = {s["name"]: (s["n"], s["accuracy"]) for s in
                      json.loads(file.read_text())["sets"]}
    assert sets["memory"].pop("data")[0] == 16 and len(sets["files"]) == 4
    assert sets["files"] == sets["memory"]

def test_cost_transfer_and_plot(trained, tmp_path):
    """GMACs against layers counted by hand; probes of separable classes; a picture."""
    (root, file), picture = (trained, tmp_path / "out.json"), tmp_path / "out.png"
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    assert ev.main([*EVAL, "--data", str(root / "data"), "--corrupt", "contrast", "--cost", *plot,
                    "--model", str(root / "robust.pt"), "--transfer", str(root / "data"),
                    "--json", str(file)]) == 0
    tables = {t[0][0]: t[1:] for t in json.loads(file.read_text())["tables"]}
    student, macs = rb.load(root / "robust.pt"), {}
    for part in ("backbone", "original", "shared", "heads"):
        macs[part] = 0
        for module in getattr(student, part).modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(lambda m, _, y, part=part: macs.update({
                    part: macs[part] + m.weight[0].numel() * y.numel()}))
    student.predict(images_of(1), with_original=True)  # the classifiers alone take K passes
    classifiers = 3 * student.heads["clean"].classifier.weight.numel()
    assert macs["heads"] > 10 * classifiers  # those K = 10 passes
    expected = [macs["backbone"] + macs["original"]] + [
        macs["backbone"] + macs["shared"] + macs["heads"] + (k - 10) * classifiers
        for k in (1, 5, 10)]
    found = [float(row[1]) for row in tables["inference, an image"]]
    assert found == pytest.approx([n / 1e9 for n in expected], rel=1e-3)
    assert {row[0] for row in tables["training robust's student, an image"]} == {
        "frozen forward pass", *rb.RECIPES}
    assert [row[1] for row in tables["linear probe, data"]] == [1.0, 1.0]
    assert not plot or min(Image.open(picture).size) > 300

def test_ctrl_c_keeps_what_was_measured(trained, tmp_path, monkeypatch):
    judge, calls = ev.judge, []

    def interrupted(model, pixels, labels):
        calls.append(len(labels))
        if len(calls) == 6:  # three batches clean, one of each corruption, half of the next
            raise KeyboardInterrupt
        return judge(model, pixels, labels)

    monkeypatch.setattr(ev, "judge", interrupted)
    with pytest.raises(SystemExit, match="130"):
        ev.main([*EVAL, "--data", str(trained / "data"), "--corrupt", "contrast", "pixelate",
                 "--severity", "3", "--batch-size", "7", "--json", str(tmp_path / "out.json"),
                 "--model", str(trained / "student.pt")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert calls[:6] == [7, 7, 2, 7, 7, 7] and found["partial"]
    assert {s["name"]: (s["n"], s["of"]) for s in found["sets"]} == {
        "data": (16, 16), "data/contrast/3": (7, 16), "data/pixelate/3": (7, 16)}

def test_each_image_counts_once_under_torchrun(trained, tmp_path):
    """Three processes for 16 images; the shares differ in size."""
    files = [tmp_path / f"{n}.json" for n in (1, 3)]
    flags = ["eval.py", "--data", trained / "data", "--corrupt", "shot_noise", "--severity", 3,
             *EVAL, "--model", trained / "robust.pt", "--json"]
    command(*flags, files[0])
    command("-m", "torch.distributed.run", "--nproc-per-node", 3, *flags, files[1])
    one, three = (json.loads(file.read_text())["sets"] for file in files)
    assert one == three and [s["n"] for s in one] == [16, 16]

# --- 12. Command lines ----------------------------------------------------------------------------
def command(*arguments):
    subprocess.run([sys.executable, *map(str, arguments)], cwd=Path(__file__).parent, check=True)

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """data/, teacher.pt, student.pt, robust.pt and apt.pt, made by the command line."""
    root = tmp_path_factory.mktemp("trained")
    rest = lambda name: [*FLAGS, "--data", str(root / "data"), "--out", str(root / f"{name}.pt")]
    student = ["--student", str(root / "student.pt")]
    make_folder(root / "data")
    command("robustify.py", "--make-teacher", *NAMED, *rest("teacher"))
    assert rb.main(["--make-teacher", *NAMED, *rest("student"), "--augment", "none"]) == 0
    command("robustify.py", *student, "--teacher", root / "teacher.pt", *rest("robust"))
    assert rb.main([*student, "--recipe", "apt", *rest("apt")]) == 0
    return root

@torch.no_grad()
def test_command_lines(trained):
    names, file = ("teacher", "student", "apt", "robust"), trained / "out.json"
    command("eval.py", "--data", trained / "data", "--corrupt", "contrast", "--severity", 1, 5,
            *EVAL, "--json", file, "--model", *(trained / f"{n}.pt" for n in names))
    sets = json.loads(file.read_text())["sets"]
    assert [(s["name"], s["n"], s["corrupted_here"]) for s in sets] == [
        ("data", 16, False), ("data/contrast/1", 16, True), ("data/contrast/5", 16, True)]
    images = [np.asarray(Image.open(p)) for p in sorted((trained / "data/val").glob("*/*.png"))]
    x, labels = torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 255, torch.arange(16) // 8
    teacher, student = (rb.load_network(str(trained / f"{n}.pt")).eval() for n in names[:2])
    apt, robust = (rb.load(trained / f"{n}.pt") for n in names[2:])
    everyone = robust.predict(x, with_original=True).everyone
    # M in the plug-in is still the student that was given, the heads no longer are.
    assert torch.allclose(everyone["original"], student(x).softmax(-1), atol=1e-5)
    assert (everyone["clean"] - everyone["original"]).abs().max() > 1e-4
    right = lambda p: p.argmax(-1) == labels
    expected = {("robust", k): right(p) for k, p in everyone.items()}
    expected |= {("teacher", "model"): right(teacher(x)), ("apt", "selected"): right(apt(x)),
                 ("student", "model"): right(student(x)),
                 ("robust", "oracle"): right(everyone["clean"]) | right(everyone["unclean"])}
    for (model, key), rows in expected.items():
        assert sets[0]["accuracy"][model][key] == pytest.approx(rows.float().mean().item())
    assert not {"clean", "oracle"} & set(sets[0]["accuracy"]["apt"])

def test_clip_command_line(trained, clips, tmp_path, capsys):
    """Zero-shot and VE; only the former can then be measured on classes that it never saw."""
    make_folder(tmp_path, ("dog", "elk"), ["val"])
    for name, flags, code in (("zs", ["--zero-shot"], 0), ("ve", [], 2)):
        out = str(tmp_path / f"{name}.pt")
        assert rb.main(["--student", "test-vit", "--recipe", "apt", *FLAGS, *flags, "--data",
                        str(trained / "data"), "--out", out]) == 0
        assert ev.main(["--model", out, "--data", str(tmp_path), *EVAL]) == code
    assert "dog" in capsys.readouterr().err.splitlines()[-1]

# --- 13. Refusals ---------------------------------------------------------------------------------
@pytest.mark.parametrize("script, flags, fragment", [  # @ is the test's folder
    *(("robustify", *case) for case in (
        (["--data", "@/nowhere"], "nowhere"), (["--data", "@/empty"], "empty"),
        (["--data", "@/flat"], "flat"), (["--data", "@/hollow"], "bee"),
        (["--teacher", "@/no.pt"], "no.pt"), (["--teacher", ""], "--teacher"),
        (["--data", "@/other/val"], "teacher.pt"), (["--data", "@/mixed"], "val"),
        (["--extra-data", "@/other/val"], "other"), (["--student", "my_resnet"], "my_resnet"),
        (["--model-args", '{"wings": 2}'], "wings"), (["--model-args", "{wings"], "--model-args"),
        (["--zero-shot"], "--zero-shot"), (["--wings"], "--wings"), (["--rule", "coin"], "coin"),
        (["--student", "swin_t", "--model-args", "{}"], "SwinTransformer"))),
    *(("eval", *case) for case in (
        (["--data", "@/nowhere"], "nowhere"), (["--model", "no.pt"], "no.pt"),
        (["--corrupt", "rain"], "rain"), (["--severity", "6"], "--severity"),
        (["--wings"], "--wings"), (["--model", "my_resnet"], "my_resnet"),
        (["--data", "@/other"], "cow")))])
def test_refusals_are_one_line(script, flags, fragment, trained, tmp_path, capsys):
    for folder in ("empty", "flat", "hollow/train/bee"):  # hollow: a class without images
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "flat/0.png")
    for folder, second, part in (("hollow", "cow", "train"), ("mixed", "bee", "train"),
                                 ("mixed", "cow", "val"), ("other", "cow", "val")):
        make_folder(tmp_path / folder, ("ant", second), [part], n=1)
    main, *base = {"eval": (ev.main, "--model", str(trained / "robust.pt"), *EVAL, "--json"),
                   "robustify": (rb.main, "--student", *NAMED, *FLAGS, "--teacher",
                                 str(trained / "teacher.pt"), "--out")}[script]
    assert main([*base, str(tmp_path / "out"), "--data", str(trained / "data"),
                 *(f.replace("@", str(tmp_path)) for f in flags)]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script}.py: ") and fragment in line and "Traceback" not in line
    assert not list(tmp_path.glob("out*"))
