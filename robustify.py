"""Efficiently Robustify Pre-Trained Models (Jain, Behl, Rawat, Vineet; ICCV 2023), in one file.

A model is robust if it stays accurate when images change: noise, blur, weather, style, camera.
Fine-tuning all of a large model on augmented images helps, but every step pays for the whole
backward pass, and the model forgets some of what pre-training taught it.

The idea: freeze most of the large model, the student. Tune its last part under three heads: the
clean one learns from clean images, the unclean one from augmented images, the combined one from
both. Two teachers help. On clean images the original model teaches, so that nothing is forgotten.
On augmented images a small robust model teaches, since a small model is cheap to make robust. At
test time nobody tells us which kind an image is, so we ask the heads. MC dropout says how unsure a
head is, a KL divergence how far it is from the combined one. Of the clean and the unclean head the
one with the smaller product answers (Eq. 6). APT, the baseline to beat, tunes the same part under
one head with labels alone.

    python robustify.py                                              # the demo, into demo/
    python robustify.py --make-teacher vit_base_patch16_224 --data imagenet/ --out vit_b16.pt
    python robustify.py --student ViT-L-14 --teacher vit_b16.pt      # writes robust.pt
    torchrun --nproc-per-node 8 robustify.py --student ViT-L-14 --teacher vit_b16.pt

    paper              where       here                              shape or value
    M = M_h M_s M_b    Eq. 1       backbone, shared, heads[name]     RobustStudent; made by `cut`
    M, the original    Sec. 4.3.1  backbone, then original_top       frozen
    M_t                Sec. 4.2    teacher                           a small Network, frozen
    D^a                Sec. 4.3    TrainingViews                     clean and augmented images
    c, m, u            Sec. 4.3.1  "clean", "combined", "unclean"    HEADS
    L_c, L_d           Sec. 4.3.1  cross_entropy, distillation       (B,), a value for each example
    L_clean, L_aug, L  Eqs. 3-5    student_loss                      beta (B,), 1 where is_clean
    P(theta | ...)     Eq. 2       fit                               training objective and loop
    phi, U_mc, K       Sec. 4.3.2  phi, uncertainty, passes          (B, C), (B,); mc_dropout
    h_f                Eq. 6       select_head                       (B,) index into HEADS
    phi_v, phi_text    Sec. 4.4    CosineClassifier                  (B, D) -> (B, C)

Shapes: B images, C classes, K passes, D features, N tokens. "Not in the paper" marks our decisions.

[6] Gal, Ghahramani: Dropout as a Bayesian approximation. [10] Hendrycks et al.: The many faces of
robustness (Noise2Net). [14] Hendrycks et al.: PixMix. [15] Hinton, Vinyals, Dean: Distillation.
[16] Jia et al.: Visual prompt tuning. [33] Wortsman et al.: WiSE-FT.
"""

import argparse
import copy
import hashlib
import inspect
import logging
import math
import os
import re
import sys
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import timm
import timm.optim
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

HEADS = ("clean", "combined", "unclean")
CHOICES = {"rule": ("kl-u", "u", "kl", "confidence"), "severity": range(1, 11),
           "augment": ("augmix+deepaugment", "augmix", "pixmix", "augmix+pixmix", "none")}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK = int(os.environ.get("RANK", 0))  # of this process; torchrun sets both
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))

class Refusal(Exception):
    """An error the user can fix; `main` prints it as one line and exits with code 2."""

@dataclass
class Config:
    """Every setting, one flag each. The defaults are the recipe; the comments are its --help."""
    student: str = ""  # the large model: NAME, NAME:TAG, NAME:FILE, NAME:none, or FILE.pt
    teacher: str = ""  # the small robust model (Sec. 4.2), named likewise
    make_teacher: str = ""  # instead, train this network whole on D^a with labels, and save it
    data: str = "imagenet"  # folder with train/CLASS/IMAGE, or with CLASS/IMAGE
    out: str = ""  # file to write; default robust.pt, or teacher.pt with --make-teacher
    recipe: str = "three-heads"  # the method, or a baseline of Sec. 5: a row of RECIPES
    fraction: float = 0.20  # Table 5: share of parameters in M_s and one head; our choice
    head_blocks: int = 1  # Sec. 4.1: last blocks that belong to each head; our choice
    prompts: int = 10  # learned tokens a block of --recipe vpt [16]; number not in the paper
    zero_shot: bool = False  # Sec. 4.4: CLIP's text embeddings stay the classifier
    image_size: int = 0  # input size of the network in pixels; 0: its own
    augment: str = "augmix+deepaugment"  # Sec. 4.2, Table 4: how D^a is augmented
    severity: int = 2  # torchvision's AugMix scale: 2 is about the published 1, 4 is about 3
    mixing: str = ""  # folder of pictures that pixmix mixes in [14]
    temperature: float = 2.0  # T of the distillation loss; not in the paper
    distill_weight: float = 1.0  # weight of L_d beside L_c; not in the paper
    dropout: float = 0.1  # Sec. 4.3.2: rate before each classifier; rate not in the paper
    block_dropout: float = 0.05  # Sec. 4.3.2: rate in tuned blocks; rate not in the paper
    passes: int = 10  # Sec. 4.3.2: MC dropout passes K; number not in the paper
    rule: str = "kl-u"  # Eq. 6; the others are the ablation
    lr: float = 3e-5  # peak learning rate; this and the next four as in [33], not in the paper
    weight_decay: float = 0.1  # of AdamW
    warmup: int = 500  # steps to the peak, at most a fifth of all; then a cosine down to 0
    epochs: int = 10
    batch_size: int = 512  # images a step, over all processes
    limit: int = 0  # train on this many images, balanced over the classes; 0: all
    seed: int = 0  # of new weights, order, views and dropout
    workers: int = min(8, os.cpu_count() or 1)  # processes that load images, for each GPU
    resume: bool = False  # go on after the last whole epoch of an interrupted run

    def __post_init__(self):
        if not self.out:
            self.out = "teacher.pt" if self.make_teacher else "robust.pt"

# --- The student: M = M_h . M_s . M_b (Eq. 1) under three heads (Sec. 4.1, Figure 4) --------------

class Prediction(NamedTuple):
    """What `RobustStudent.predict` returns."""
    probabilities: torch.Tensor  # (B, C), phi of the chosen head
    head: torch.Tensor           # (B,), index into HEADS
    uncertainty: torch.Tensor    # (B,), U_mc of the chosen head, from 0 to 0.5
    phi: dict                    # {head name: (B, C)}

class RobustStudent(nn.Module):
    """The student of Figure 4: M_b frozen, M_s tuned, and a tuned M_h for each head. Beside them
    stands what the original has in place of M_s and M_h, frozen.

    backbone: pixels (B, 3, H, W) in [0, 1] -> z. shared: z -> h, an nn.Sequential, may be empty.
    head: h -> logits (B, C), an nn.Sequential that ends with the classifier, which has a `weight`
    (C, D). `cut` makes the three of a library's network; write one of your own like this:

    >>> block = BranchDropout(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)))
    >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    >>> student = RobustStudent(nn.Conv2d(3, 8, 3), nn.Sequential(block), head, Config())
    >>> teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))  # yours is a robust one
    >>> pixels, labels = torch.rand(6, 3, 32, 32), torch.arange(6) % 4
    >>> loss = student_loss(student.train(), teacher, pixels, labels, is_clean=labels < 2)
    >>> student.eval().predict(pixels).probabilities.shape
    torch.Size([6, 4])

    `save(student, file)` writes the tuned part, `load(file, (backbone, shared, head))` reads it.
    """
    size = class_names = text = None  # `cut` fills these in, for a library's network

    def __init__(self, backbone, shared, head, config):
        super().__init__()
        self.config = config
        self.recipe = RECIPES[config.recipe]
        self.backbone = backbone.requires_grad_(False)                  # M_b
        self.original_top = copy.deepcopy(nn.Sequential(shared, head)).requires_grad_(False)
        self.shared = copy.deepcopy(shared)                             # M_s
        self.heads = nn.ModuleDict()                                    # M_h, one per head
        for name in self.recipe.heads:
            self.heads[name] = Head(copy.deepcopy(head), config.dropout)
        if self.recipe.tuned == "prompts":
            self.shared.requires_grad_(False)
            for i in range(len(shared) - 1):  # all but the pooling
                self.shared[i] = PromptedBlock(self.shared[i].block, config.prompts)
        for module in self.modules():
            if isinstance(module, BranchDropout):
                module.rate = config.block_dropout
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the network's own
        self.classes, width = head[-1].weight.shape                     # C, D
        self.masks = nn.Buffer(dropout_masks(config, width))            # (K, D)
        self.eval()

    def train(self, mode=True):
        """Training mode for the tuned part alone."""
        super().train(mode)
        self.backbone.eval()
        self.original_top.eval()
        return keep_statistics(self)

    def forward(self, pixels):
        """pixels (B, 3, H, W) in [0, 1] -> class probabilities (B, C)."""
        return self.predict(pixels).probabilities

    @torch.no_grad()
    def predict(self, pixels):
        """pixels (B, 3, H, W) in [0, 1] -> Prediction. Raises Refusal for whole numbers."""
        if not torch.is_tensor(pixels) or not pixels.is_floating_point():
            raise Refusal("predict takes floats (B, 3, H, W) in [0, 1]; see preprocess")
        return self.predict_from(self.backbone(pixels.clone()))         # M_b

    @torch.no_grad()
    def predict_from(self, z):
        """z, what M_b gives -> Prediction (Sec. 4.3.2). Dropout in blocks is off, so that only the
        classifier runs K times (not in the paper, which passes K times through whole heads)."""
        h = self.shared(z.clone())                                      # M_s
        phi = {}
        uncertainty = {}
        for name, head in self.heads.items():                           # M_h
            features = head.body(h.clone())  # a layer of yours may work in place
            phi[name], uncertainty[name] = mc_dropout(head.classifier, features, self.masks)
        chosen = select_head(phi, uncertainty, self.config.rule)        # Eq. 6
        p = of_chosen_head(phi, chosen)
        return Prediction(p, chosen, of_chosen_head(uncertainty, chosen), phi)

    def preprocess(self, image):
        """A PIL image -> pixels (3, size, size) in [0, 1], as eval.py shows it to this student."""
        return centre_view(v2.functional.pil_to_tensor(image.convert("RGB")), self.size) / 255

def cut(network, config):
    """Eq. 1: cut a Network into M_b, M_s and M_h, plug in heads -> RobustStudent. Its stages are
    normalisation, stem, blocks, pooling (a ViT-B has 15); then the classifier. Raises Refusal."""
    stages = stages_of(network, config)
    start, head_start = find_cut(stages, network.classifier, config)
    backbone = nn.Sequential(*stages[:start])
    shared = nn.Sequential(*stages[start:head_start])
    head = nn.Sequential(*stages[head_start:], network.classifier)
    student = RobustStudent(backbone, shared, head, config)
    student.size = network.size
    student.class_names = network.class_names
    if config.zero_shot:
        student.text = network.text
    return student

def find_cut(stages, classifier, config):
    """Indices into `stages`: where M_s starts, and where the heads, which have the last
    --head-blocks blocks (Sec. 4.1). M_s and ONE head have --fraction of all parameters, nearly."""
    end = len(stages)
    head_start = max(2, end - 1 - config.head_blocks)  # normalisation and stem are in no head
    tuned = RECIPES[config.recipe].tuned
    if tuned == "all":
        return 1, head_start
    if tuned == "prompts":
        return 2, end  # prompts enter every block; the classifier alone is the head
    if tuned == "classifier":
        return end, end
    wanted = config.fraction * count_parameters(*stages, classifier)
    misses = [abs(count_parameters(*stages[start:], classifier) - wanted)
              for start in range(1, head_start + 1)]
    return 1 + int(np.argmin(misses)), head_start

class Head(nn.Module):
    """M_h: last blocks, pooling, norm and projection (`body`); then dropout and the classifier."""
    def __init__(self, layers, rate):
        super().__init__()
        self.body = layers[:-1]
        self.classifier = layers[-1]
        self.rate = rate

    def forward(self, h):
        """h, what M_s gives -> logits (B, C)."""
        return self.classifier(F.dropout(self.body(h), self.rate, self.training))

class BranchDropout(nn.Module):
    """A residual block with dropout, while training, on what it adds to its input, if its shape
    stays (Sec. 4.3.2; the place is not in the paper: on the sum 0.1 would be too much noise)."""
    def __init__(self, block):
        super().__init__()
        self.block = block
        self.rate = 0.0  # RobustStudent sets it

    def forward(self, x):
        if not self.training:
            return self.block(x)
        y = self.block(x.clone())
        if y.ndim == 3:
            x = x[:, :y.shape[1]]  # a block may keep the class token alone
        if y.shape != x.shape:
            return y
        return x + F.dropout(y - x, self.rate)

class CosineClassifier(nn.Module):
    """scale * normalize(f) . normalize(W), (..., D) -> (..., C), as CLIP has it (Sec. 4.4). W
    starts at the text embeddings; visual evaluation (VE) trains it, zero shot (ZS) does not."""
    def __init__(self, weight, scale, trained):
        super().__init__()
        weight = F.normalize(weight.float(), dim=-1)
        self.weight = nn.Parameter(weight) if trained else nn.Buffer(weight)
        self.scale = nn.Buffer(torch.as_tensor(scale, dtype=torch.float32))

    def forward(self, features):
        # In bfloat16, at CLIP's scale of 100, the logits would be wrong by 0.1.
        with torch.autocast(features.device.type, enabled=False):
            features = F.normalize(features.float(), dim=-1)
            return self.scale * features @ F.normalize(self.weight.float(), dim=-1).T

# --- The loss (Sec. 4.3.1) ------------------------------------------------------------------------

def distillation(student_logits, teacher_logits, temperature):
    """L_d [15]: T^2 KL(teacher_T || student_T) of logits (n, C) -> (n,), in nats, in float32."""
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * divergence

def student_loss(student, teacher, pixels, labels, is_clean):
    """Eqs. 3 to 5: pixels (B, 3, H, W) in [0, 1], labels (B,), is_clean (B,) bool -> scalar.
    A clean example is taught by the original and reaches the clean and the combined head. An
    augmented example is taught by the robust teacher and reaches the unclean and the combined head.
    (Eqs. 3 and 4 name one teacher; the text of Secs. 4.3.1 and 5 names two.)"""
    recipe = student.recipe
    learns = {"clean": is_clean, "combined": torch.ones_like(is_clean), "unclean": ~is_clean}
    with torch.no_grad():
        z = student.backbone(pixels.clone())                # M_b, for student and original
        teacher_logits = torch.zeros(len(labels), student.classes, device=z.device)
        teachers = ((recipe.clean_teacher, is_clean), (recipe.augmented_teacher, ~is_clean))
        for who, taught in teachers:
            if who == "original" and taught.any():
                teacher_logits[taught] = student.original_top(z[taught]).float()
            elif who == "robust" and taught.any():  # a CLIP ViT crashes on an empty batch
                teacher_logits[taught] = teacher.eval()(pixels[taught]).float()
    h = student.shared(z)                                   # M_s
    loss = {name: torch.zeros(len(labels), device=z.device) for name in HEADS}
    for name, head in student.heads.items():
        own = learns[name]  # the examples that reach this head; the others add no loss
        if own.any():
            logits = head(h[own])                           # M_h
            loss[name][own] = F.cross_entropy(logits.float(), labels[own], reduction="none")
            if recipe.clean_teacher != "nobody":
                L_d = distillation(logits, teacher_logits[own], student.config.temperature)
                loss[name][own] += student.config.distill_weight * L_d
    L_clean = loss["clean"] + loss["combined"]              # Eq. 3, (B,), for clean examples
    L_aug = loss["unclean"] + loss["combined"]              # Eq. 4, (B,), for augmented examples
    beta = is_clean.float()
    return (beta * L_clean + (1 - beta) * L_aug).mean()     # Eq. 5

# --- Head selection (Sec. 4.3.2) ------------------------------------------------------------------

def dropout_masks(config, width):
    """K masks of inverted dropout (K, D), D = width: 0, or 1 / (1 - rate) where a feature is kept.
    They are drawn once, for all images and heads, so that a prediction depends on its image alone.
    With one head there is nothing to select: one mask, of ones (neither is in the paper)."""
    if len(RECIPES[config.recipe].heads) == 1:
        return torch.ones(1, width)
    keep = 1 - config.dropout
    generator = torch.Generator().manual_seed(config.seed)
    draws = torch.rand(config.passes, width, generator=generator)
    return (draws < keep) / keep

def mc_dropout(classifier, features, masks):
    """MC dropout [6]: features (B, D), masks (K, D) -> phi (B, C), U_mc (B,). phi: mean over passes
    of the softmax. U_mc: its standard deviation over passes, averaged over classes (probabilities,
    and this average, are not in the paper)."""
    logits = classifier(features[:, None] * masks)          # (B, K, C), all passes at once
    p = logits.float().softmax(-1)
    return p.mean(1), p.std(1, correction=0).mean(-1)

def kl_divergence(p, q):
    """KL(p || q) of probabilities (B, C) -> (B,), in nats, at least 0; finite where q is 0."""
    tiny = torch.finfo(p.dtype).tiny
    log_ratio = p.clamp_min(tiny).log() - q.clamp_min(tiny).log()
    return (p * log_ratio).sum(-1).clamp_min(0)  # rounding can give -5e-7 where p is nearly q

def select_head(phi, uncertainty, rule="kl-u"):
    """Eq. 6: argmin over k in {c, u} of U_k * KL(phi_m || phi_k) -> (B,) index into HEADS.
    phi {head: (B, C)}, uncertainty {head: (B,)}. Other rules are the paper's ablation: one factor
    alone, or the highest probability. A tie goes to the clean head (not in the paper)."""
    if "clean" not in phi:
        return torch.full_like(phi["combined"][:, 0], HEADS.index("combined"), dtype=torch.long)
    score = {}
    for name in ("clean", "unclean"):
        divergence = kl_divergence(phi["combined"], phi[name])
        if rule == "kl-u":
            score[name] = uncertainty[name] * divergence
        elif rule == "u":
            score[name] = uncertainty[name]
        elif rule == "kl":
            score[name] = divergence
        elif rule == "confidence":
            score[name] = -phi[name].amax(-1)
    prefers_clean = score["clean"] <= score["unclean"]
    return torch.where(prefers_clean, HEADS.index("clean"), HEADS.index("unclean"))

def of_chosen_head(values, chosen):
    """values {head: (B, ...)}, chosen (B,) index into HEADS -> (B, ...), each row its head's."""
    every = torch.stack([values.get(name, values["combined"]) for name in HEADS])  # (3, B, ...)
    index = chosen.view(1, -1, *[1] * (every.ndim - 2)).expand_as(every[:1])
    return every.gather(0, index)[0]  # gather lets torch.export keep the batch dynamic

# --- Recipes: the method, and the baselines of Sec. 5 ---------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """What distinguishes the methods: no code asks for a recipe's name, but what its row says."""
    heads: tuple             # which of HEADS are tuned; "combined" is always one
    clean_teacher: str       # of clean examples: "original", "robust" or "nobody"
    augmented_teacher: str   # of augmented ones; "nobody" for both or neither
    tuned: str               # "all", the "part" of --fraction, "prompts", or the "classifier"
    examples: str            # of "both" kinds, or "clean" alone
    starts_at: str = "probe"  # a CLIP: at a linear "probe", or at its "text" embeddings

# In the paper's tables single-teacher and combined-head are "Single-Teacher" and "Only K.D."; with
# --zero-shot, ft and apt are ZS-Full and ZS-APT. For WiSE-FT, `load` interpolates by alpha.
RECIPES = {
    "three-heads":    Recipe(HEADS, "original", "robust", "part", "both"),
    "combined-head":  Recipe(("combined",), "original", "robust", "part", "both"),
    "single-teacher": Recipe(("combined",), "robust", "robust", "part", "both"),
    "apt":            Recipe(("combined",), "nobody", "nobody", "part", "both"),
    "lp":             Recipe(("combined",), "nobody", "nobody", "classifier", "clean"),
    "vpt":            Recipe(("combined",), "nobody", "nobody", "prompts", "clean"),
    "ft":             Recipe(("combined",), "nobody", "nobody", "all", "clean"),
    "ft-augmented":   Recipe(("combined",), "nobody", "nobody", "all", "both"),
    "wise-ft":        Recipe(("combined",), "nobody", "nobody", "all", "clean", "text"),
    "wise-ft-lc":     Recipe(("combined",), "nobody", "nobody", "classifier", "clean", "text"),
}

class PromptedBlock(nn.Module):
    """VPT [16]: a frozen block of a ViT that reads `count` learned tokens besides, (B, N, D) ->
    (B, N, D). Every block has its own ("deep"); what it makes of them is dropped."""
    def __init__(self, block, count):
        super().__init__()
        self.block = block
        width = len(next(block.parameters()))  # the first norm's weight
        self.prompts = nn.Parameter(torch.empty(count, width).uniform_(-0.1, 0.1))

    def forward(self, x):
        prompts = self.prompts.expand(len(x), -1, -1)
        y = self.block(torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))
        return torch.cat([y[:, :1], y[:, 1 + prompts.shape[1]:]], dim=1)

# --- Data: D^a, clean and augmented images (Secs. 4.2, 4.3) ---------------------------------------

class ImageClasses(ImageFolder):
    """The images CLASS/IMAGE of a folder: `samples` [(path, label)], `classes`. Raises Refusal."""
    def __init__(self, folder, minimum=2):
        try:
            super().__init__(folder)
        except OSError as error:
            raise Refusal(f"{folder}: needs images CLASS/IMAGE ({error})") from error
        folders = {os.path.dirname(path) for path, _ in self.samples}
        if len(folders) > len(self.classes):
            raise Refusal(f"{folder}: holds folders of folders ({min(folders)}); go deeper")
        if len(self.classes) < minimum:
            raise Refusal(f"{folder}: one class, {self.classes[0]}; name the folder above")

    def find_classes(self, directory):
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        return names, {name: i for i, name in enumerate(names)}

def balanced(samples, count, seed):
    """`count` of the samples [(path, label)], equally many of each class, drawn by `seed`."""
    drawn = Counter()
    ranked = []
    for index in np.random.default_rng(seed).permutation(len(samples)):
        label = samples[index][1]
        ranked.append((drawn[label], index))
        drawn[label] += 1
    return [samples[index] for _, index in sorted(ranked)[:count]]

def read_image(path):
    """uint8 (3, H, W) of an image file; its EXIF rotation is ignored, as usual. Raises Refusal."""
    try:
        return v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
    except Exception as error:  # a broken file may raise anything
        raise Refusal(f"{path}: cannot be read ({error}); replace it") from error

def centre_view(image, size):
    """uint8 (3, H, W) -> uint8 (3, size, size), the view for measuring: squares of at most 64 px
    whole, else the central 224/256 of the short side, as ImageNet is measured."""
    if image.shape[1] == image.shape[2] <= 64:
        return v2.functional.resize(image, [size, size], v2.InterpolationMode.BICUBIC)
    image = v2.functional.resize(image, [size * 256 // 224])
    return v2.functional.center_crop(image, [size, size])

def set_seed(*numbers):
    """Seed torch by these numbers together."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))

def coin():
    """True half of the time."""
    return bool(torch.rand(()) < 0.5)

def noise2net(image):
    """DeepAugment's form without weights [10], of an image (3, H, W) in [0, 1]: y + eps f(y), four
    times; f is a random Res2Net block, here of 16 channels, not 64: as strong, and faster."""
    def convolution(x, channels, kernel, dilation):
        bound = (x.shape[1] * kernel**2) ** -0.5
        weight = torch.empty(channels, x.shape[1], kernel, kernel).uniform_(-bound, bound)
        x = F.conv2d(x, weight, padding=kernel // 2 * dilation, dilation=dilation)
        return F.instance_norm(x)

    y = (image[None] - 0.45) / 0.226  # ImageNet's mean and deviation
    eps = torch.empty(()).uniform_(0.375, 0.75)
    for _ in range(4):
        groups = F.relu(convolution(y, 16, 1, 1)).chunk(4, dim=1)
        outputs = [groups[0]]
        for group in groups[1:]:
            kernel = 1 if coin() else 3
            dilation = int(torch.randint(1, 4, ()))
            outputs.append(F.relu(convolution(group + outputs[-1], 4, kernel, dilation)))
        y = y + eps * convolution(torch.cat(outputs, dim=1), 3, 1, 1)
    return (y[0] * 0.226 + 0.45).clamp(0, 1)

def mix(x, y, a, b, multiply):
    """PixMix's step [14]: images x, y in [0, 1], weights a, b -> image in [0, 1]. They are added on
    [-1, 1], or multiplied on [0, 2]."""
    if multiply:
        mixed = (2 * x) ** a * (2 * y).clamp_min(1e-6) ** b / 2  # b may be negative
    else:
        mixed = (a * (2 * x - 1) + b * (2 * y - 1) + 1) / 2
    return mixed.clamp(0, 1)

class TrainingViews(ImageClasses):
    """D^a: index -> (uint8 (3, size, size), label, is_clean), a function of seed, epoch and index.
    A fair coin makes an example clean or augmented (not in the paper). Raises Refusal."""
    size = epoch = 0  # the run sets the network's size, `fit` counts the epochs

    def __init__(self, config):
        train = Path(config.data, "train")  # a class may be called so; it holds no folders
        super().__init__(train if any(train.glob("*/*")) else config.data)
        self.config = config
        self.augment = "none" if RECIPES[config.recipe].examples == "clean" else config.augment
        if config.limit:
            self.samples = balanced(self.samples, max(config.limit, len(self.classes)), config.seed)
        # False is not in the paper: the other operations are among ImageNet-C's corruptions.
        self.augmix = v2.AugMix(config.severity, all_ops=False)
        self.one_operation = v2.AugMix(config.severity, 1, 1, all_ops=False)  # width 1, depth 1
        self.pictures = sorted(Path(config.mixing).rglob("*.*")) if config.mixing else []
        if "pixmix" in self.augment and not self.pictures:
            raise Refusal(f"--augment {self.augment}: needs --mixing, a folder of pictures")

    def __getitem__(self, index):
        set_seed(self.config.seed, self.epoch, index)
        path, label = self.samples[index]
        view = self.crop(read_image(path))
        if self.augment == "none" or coin():
            return view, label, True
        return self.augmented(view), label, False

    def crop(self, image):
        """A random part of the image, (3, size, size), flipped by a coin."""
        if self.size <= 64:  # as CIFAR is cropped
            crop = v2.Compose([v2.Resize(self.size), v2.RandomCrop(self.size, self.size // 8)])
        else:
            crop = v2.RandomResizedCrop(self.size)
        return v2.RandomHorizontalFlip()(crop(image))

    def augmented(self, view):
        """The view by --augment. Half of the views have Noise2Net before AugMix; of augmix+pixmix a
        coin chooses one (neither is in the paper)."""
        if self.augment == "augmix+deepaugment" and coin():
            view = (255 * noise2net(view / 255)).byte()
        if self.augment == "pixmix" or (self.augment == "augmix+pixmix" and coin()):
            return self.pixmix(view)
        return self.augmix(view)

    def pixmix(self, view, rounds=4, beta=3.0):
        """PixMix [14]: mix the view up to `rounds` times with a picture or an augmented copy, which
        has one operation (AugMix of width and depth 1 comes near)."""
        mixed = (self.one_operation(view) if coin() else view) / 255
        for _ in range(int(torch.randint(rounds + 1, ()))):
            if coin():
                drawn = int(torch.randint(len(self.pictures), ()))
                partner = self.crop(read_image(self.pictures[drawn]))
            else:
                partner = self.one_operation(view)
            a = torch.distributions.Beta(beta, 1).sample()
            b = torch.distributions.Beta(1, beta).sample()
            if coin():
                a = 2 - a  # 1 + Beta(1, beta)
                b = -b
            mixed = mix(mixed, partner / 255, a, b, multiply=coin())
        return (255 * mixed).round().byte()

# --- The training loop (Eq. 2) --------------------------------------------------------------------

def get_lr(step, total, config):
    """Linear warm-up, then half a cosine down to 0 [33]."""
    warmup = min(config.warmup, total // 5)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

def make_optimizer(model, config):
    """AdamW over the trainable parameters, without decay of biases, norms and cosine rows."""
    rows = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, CosineClassifier)]
    return torch.optim.AdamW(timm.optim.param_groups_weight_decay(
        model, config.weight_decay, no_weight_decay_list=rows))

@torch.no_grad()
def renormalise(model):
    """Trained cosine rows back to length 1 (not in the paper): short ones have large gradients."""
    for module in model.modules():
        if isinstance(module, CosineClassifier) and module.weight.requires_grad:
            module.weight.copy_(F.normalize(module.weight, dim=-1))

def autocast():
    """bfloat16 on a GPU, where it needs no scaling of the loss; float32 on a CPU."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")

def batches(views, config):
    """(loader, sampler) of this process's share of each step, which holds the same images on any
    number of processes that divides it; an epoch's last, smaller step is left out."""
    per_process = min(config.batch_size, len(views)) // PROCESSES
    if per_process == 0:
        raise Refusal(f"--batch-size or {len(views)} images: below the {PROCESSES} processes")
    sampler = DistributedSampler(views, PROCESSES, RANK, seed=config.seed, drop_last=True)
    loader = DataLoader(views, per_process, sampler=sampler, drop_last=True,
                        num_workers=config.workers, pin_memory=DEVICE == "cuda")
    print(f"images    {len(views)} of {len(views.classes)} classes; augment: {views.augment}; "
          f"{config.epochs * len(loader)} steps of {per_process * PROCESSES} on {DEVICE}")
    return loader, sampler

def fit(model, loss_of, views, config, write, progress=None):
    """Eq. 2: minimise loss_of(pixels, labels, is_clean) over the trainable parameters of `model`.
    write(path, **progress) saves it, after each epoch into a .part file, with what --resume needs
    as `progress`, at the end into config.out. Raises Refusal for a loss or gradient of NaN."""
    model.to(DEVICE)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)  # a head that sees no example has gradient 0, not None
    optimizer = make_optimizer(model, config)
    first_epoch = 0
    if progress is not None:
        optimizer.load_state_dict(progress["optimizer"])
        first_epoch = progress["epoch"]
    loader, sampler = batches(views, config)
    steps = config.epochs * len(loader)
    for epoch in range(first_epoch, config.epochs):
        sampler.set_epoch(epoch)
        views.epoch = epoch
        model.train()
        bar = tqdm(loader, f"epoch {epoch + 1} of {config.epochs}", mininterval=2, disable=RANK > 0)
        for step, batch in enumerate(bar, epoch * len(loader)):
            images, labels, is_clean = (t.to(DEVICE, non_blocking=True) for t in batch)
            set_seed(config.seed, RANK, step)  # of dropout
            for group in optimizer.param_groups:
                group["lr"] = get_lr(step, steps, config)
            with autocast():
                loss = loss_of(images / 255, labels, is_clean)
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            for p in trained:
                if PROCESSES > 1:
                    torch.distributed.all_reduce(p.grad)
                    p.grad /= PROCESSES
            norm = nn.utils.clip_grad_norm_(trained, 1.0)  # as in [33], not in the paper
            if not math.isfinite(loss.item() + norm.item()):
                raise Refusal(f"epoch {epoch + 1}: loss {loss.item()}, gradient {norm}; lower --lr")
            optimizer.step()
            renormalise(model)
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        model.eval()
        if RANK == 0:
            write(f"{config.out}.part", epoch=epoch + 1, optimizer=optimizer.state_dict())
    if RANK == 0:
        write(config.out)
        Path(f"{config.out}.part").unlink()

# --- A run: the student, or its robust teacher (Secs. 4.2, 4.3) -----------------------------------

def robustify(config):
    """Sec. 4.3: cut the student, tune it on D^a under its heads, write it. Raises Refusal."""
    recipe = RECIPES[config.recipe]
    can_choose = 0 < config.dropout < 1 and config.passes > 1
    if "unclean" in recipe.heads and (config.augment == "none" or not can_choose):
        raise Refusal("three heads need augmented images, --dropout, and 2 --passes")
    if config.zero_shot and recipe.tuned == "classifier":
        raise Refusal(f"--zero-shot keeps what --recipe {config.recipe} tunes")
    views = TrainingViews(config)
    progress = unfinished_run(config, "plug-in", views)
    teacher = nn.Identity()  # of recipes without one
    if "robust" in (recipe.clean_teacher, recipe.augmented_teacher):
        teacher = load_teacher(config, views.classes).to(DEVICE)
    seen = f"{len(views)} images, teacher {fingerprint(teacher)}"
    if progress is None:
        network = load_network(config.student, config.image_size, config.seed)
        stages_of(network, config)  # refuses before the long work
        give_classifier(network, views, config)
        set_seed(config.seed)  # of new prompts
        student = cut(network, config)
        describe(student, count_parameters(network))
    else:
        student = load(f"{config.out}.part")
        if progress["seen"] != seen:
            raise Refusal(f"--resume: was {progress['seen']}, is now {seen}")
    views.size = student.size
    loss_of = partial(student_loss, student, teacher)
    fit(student, loss_of, views, config, partial(save, student, seen=seen), progress)

def make_teacher(config):
    """Sec. 4.2: train a whole network on D^a with labels alone, and write it. It begins with a
    linear probe, so that it keeps what it knew (not in the paper). Raises Refusal."""
    config = replace(config, recipe="ft-augmented", zero_shot=False)
    views = TrainingViews(config)
    progress = unfinished_run(config, "network", views)
    if progress is None:
        network = load_network(config.make_teacher, config.image_size, config.seed)
        give_classifier(network, views, config)
        print(f"network   {config.make_teacher}, {network.size} px, {network.prepare[1]}")
    else:
        network = read_network(f"{config.out}.part")
    network.trains_statistics = config.make_teacher.endswith(":none")
    views.size = network.size

    def loss_of(pixels, labels, is_clean):
        return F.cross_entropy(network(pixels).float(), labels)

    fit(network, loss_of, views, config, partial(save_network, network, config=config), progress)

def load_teacher(config, class_names):
    """The robust teacher for these classes, frozen. Raises Refusal where it has others."""
    if not config.teacher:
        raise Refusal(f"--recipe {config.recipe} needs --teacher FILE.pt; see --make-teacher")
    teacher = load_network(config.teacher)
    if not keep_classes(teacher, class_names):
        raise Refusal(f"--teacher {config.teacher}: does not name the classes of --data")
    return teacher.requires_grad_(False)

def give_classifier(network, views, config):
    """Gives `network`, the original M from now on, a classifier for the classes of --data: its own
    rows where it knows them; else a CLIP's text embeddings, which zero shot (ZS) takes as they are
    and from which visual evaluation (VE) starts a linear probe; else a probe. Raises Refusal."""
    if config.zero_shot and network.text is None:
        raise Refusal(f"--zero-shot: {config.student} has no text encoder")
    if keep_classes(network, views.classes):
        return
    network.class_names = views.classes
    if network.text is not None:
        embeddings = embed_text(network.text, views.classes)
        network.classifier = CosineClassifier(*embeddings, trained=not config.zero_shot)
        if config.zero_shot or RECIPES[config.recipe].starts_at == "text":
            return
    features, labels = all_features(network.to(DEVICE), views)
    if network.text is None:
        network.classifier = nn.Linear(features.shape[1], len(views.classes), device=DEVICE)
    linear_probe(features, labels, network.classifier)

def keep_classes(network, names):
    """Cuts the classifier to the classes `names`, where it knows all; returns whether it does."""
    known = network.class_names or []
    if network.classifier is None or not set(names) <= set(known):
        return False
    rows = [known.index(name) for name in names]
    for p in network.classifier.parameters():
        p.data = p.data[rows]
    network.class_names = names
    return True

@torch.no_grad()
def all_features(network, views):
    """(features (n, D), labels (n,)) of all images as they are measured; processes share them."""
    centre = copy.copy(views)
    centre.augment = "none"
    centre.crop = partial(centre_view, size=network.size)
    share = Subset(centre, range(RANK, len(views), PROCESSES))
    loader = DataLoader(share, 64, num_workers=views.config.workers)
    found = []
    for images, labels, _ in tqdm(loader, "features", mininterval=2, disable=RANK > 0):
        with autocast():
            found.append((network.features(images.to(DEVICE) / 255).float().cpu(), labels))
    everyone = [found]
    if PROCESSES > 1:
        everyone = [None] * PROCESSES
        torch.distributed.all_gather_object(everyone, found)
    return [torch.cat(column).to(DEVICE) for column in zip(*sum(everyone, []))]

def linear_probe(features, labels, classifier, weight_decay=1e-4):
    """Fits `classifier` in place to features (n, D) and labels (n,) by L-BFGS: mean cross-entropy,
    for an nn.Linear also weight_decay * squared norm of the weight, which a cosine divides out."""
    is_linear = isinstance(classifier, nn.Linear)
    for p in classifier.parameters():
        p.data *= not is_linear  # a linear layer starts at 0, so that nothing is random
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=1000,
                                  line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(features), labels)
        loss = loss + weight_decay * is_linear * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    renormalise(classifier)
    for p in classifier.parameters():
        if PROCESSES > 1:
            torch.distributed.broadcast(p.data, src=0)

def describe(student, total):
    """Print what is cut where, and who teaches whom; total: the network's number of parameters."""
    head = student.heads["combined"]
    every = sum(p.numel() for p in student.parameters() if p.requires_grad)
    tuned = every - (len(student.heads) - 1) * count_parameters(head)
    print(f"network   {student.config.student}, {student.size} px, {student.backbone[0][1]}")
    print(f"stages    {len(student.backbone)} frozen, {len(student.shared)} shared, "
          f"{len(head.body)} in a head; tuned {tuned / total:.1%}, all heads {every / total:.1%}")
    if student.recipe.tuned == "part" and len(student.shared) == 0:
        more = (tuned + count_parameters(student.backbone[-1])) / total
        print(f"          nothing is shared; --fraction {more:.2f} would share one block")
    print(f"recipe    {student.recipe}")

# --- Networks: how a library's network is loaded, and taken apart ---------------------------------

class Part(nn.Module):
    """The children and parameters `names` of `net`, with a forward pass `run` of their own."""
    def __init__(self, net, names, run):
        super().__init__()
        self.net = copy.copy(net)
        self.net._modules = {k: v for k, v in net._modules.items() if k in names}
        self.net._parameters = {k: v for k, v in net._parameters.items() if k in names}
        self.run = run

    def forward(self, x):
        return self.run(self.net, x)

class ClassTokenBlock(nn.Module):
    """The last block of a CLIP ViT, which pools the class token alone, (B, N, D) -> (B, 1, D): keys
    and values of all, query and MLP of one. Exact, a sixth of the cost (not in the paper)."""
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        block = self.block
        tokens = block.ln_1(x)
        y = x[:, :1] + block.ls_1(block.attention(tokens[:, :1], tokens, tokens))
        return y + block.ls_2(block.mlp(block.ln_2(y)))

def split_open_clip_vit(net):
    """(stem, blocks, pool) of an open_clip VisionTransformer."""
    def pool(net, x):
        return net._pool(x)[0] @ net.proj

    blocks = list(net.transformer.resblocks)
    pools_class_token = net.pool_type == "tok" and net.attn_pool is None
    if pools_class_token and type(blocks[-1]) is open_clip.transformer.ResidualAttentionBlock:
        blocks[-1] = ClassTokenBlock(blocks[-1])
    first = ["conv1", "class_embedding", "positional_embedding", "patch_dropout", "ln_pre"]
    stem = Part(net, first, type(net)._embeds)
    return stem, blocks, Part(net, ["attn_pool", "ln_post", "proj"], pool)

def split_open_clip_resnet(net):
    """(stem, blocks, pool) of an open_clip ModifiedResNet."""
    first = [name for name in net._modules if not name.startswith(("layer", "attnpool"))]
    stem = Part(net, first, type(net).stem)
    return stem, [*net.layer1, *net.layer2, *net.layer3, *net.layer4], net.attnpool

def split_timm_vit(net):
    """(stem, blocks, pool) of a timm VisionTransformer."""
    def stem(net, x):
        return net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x))))

    def pool(net, x):
        return net.forward_head(net.norm(x))

    first = ["patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "patch_drop",
             "norm_pre"]
    last = ["norm", "attn_pool", "fc_norm", "head_drop", "head"]
    return Part(net, first, stem), net.blocks, Part(net, last, pool)

def split_timm_resnet(net):
    """(stem, blocks, pool) of a timm ResNet."""
    stem = nn.Sequential(net.conv1, net.bn1, net.act1, net.maxpool)
    return stem, [*net.layer1, *net.layer2, *net.layer3, *net.layer4], net.global_pool

def split_timm_efficientnet(net):
    """(stem, blocks, pool) of a timm EfficientNet."""
    blocks = [block for stage in net.blocks for block in stage]
    stem = nn.Sequential(net.conv_stem, net.bn1)
    return stem, blocks, nn.Sequential(net.conv_head, net.bn2, net.global_pool)

FAMILIES = {
    "open_clip VisionTransformer": split_open_clip_vit,
    "open_clip ModifiedResNet": split_open_clip_resnet,
    "timm VisionTransformer": split_timm_vit,
    "timm ResNet": split_timm_resnet,
    "timm EfficientNet": split_timm_efficientnet,
}

def stages_of(network, config):
    """[normalisation, stem, blocks ..., pooling] of a Network. Raises Refusal."""
    family = f"{type(network.net).__module__.split('.')[0]} {type(network.net).__name__}"
    needs_vit = RECIPES[config.recipe].tuned == "prompts"
    if family not in FAMILIES or (needs_vit and "VisionTransformer" not in family):
        raise Refusal(f"--recipe {config.recipe}: not for a {family}; for {', '.join(FAMILIES)}")
    stem, blocks, pool = FAMILIES[family](network.net)
    return [network.prepare, stem, *map(BranchDropout, blocks), pool]

def count_parameters(*modules):
    """Number of parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())

def keep_statistics(model):
    """Batch norm keeps the statistics of pre-training, while training too (not in the paper)."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model

class Network(nn.Module):
    """A whole network M: pixels (B, 3, H, W) in [0, 1] -> logits (B, C)."""
    trains_statistics = False  # of batch norm, in training mode
    class_names = None         # of the outputs, None where unknown
    text = None                # of a CLIP: (the model, its tokenizer)

    def __init__(self, name, net, classifier, size, mean, std):
        super().__init__()
        self.name = name              # load_network(f"{name}:none", size) has this architecture
        self.size = size              # of the input, in pixels
        resize = v2.Resize((size, size), v2.InterpolationMode.BICUBIC)
        self.prepare = nn.Sequential(resize, v2.Normalize(mean, std))
        self.prepare.looks = nn.Buffer(torch.tensor([mean, std]))  # for the fingerprint
        self.net = net.eval()         # a library's, without classifier: -> features (B, D)
        self.classifier = classifier  # features -> logits; None in a bare tower

    def train(self, mode=True):
        super().train(mode)
        return self if self.trains_statistics else keep_statistics(self)

    def features(self, pixels):
        """pixels (B, 3, H, W) in [0, 1] -> (B, D), what the classifier sees."""
        return self.net(self.prepare(pixels))

    def forward(self, pixels):
        return self.classifier(self.features(pixels))

def load_network(name, image_size=0, seed=0):
    """A Network by its name: NAME of open_clip or timm (default weights, of open_clip OpenAI's),
    NAME:TAG of open_clip, NAME.TAG of timm, NAME:FILE with the mean and std of NAME's default tag,
    NAME.TAG:FILE with TAG's, NAME:none with random weights, FILE.pt of ours. Raises Refusal."""
    if name.endswith(".pt") and (Path(name).is_file() or ":" not in name):
        return read_network(name)
    family, _, weights = name.partition(":")
    if timm.is_model(family):
        build = build_timm
    elif family.partition(".")[0] in open_clip.list_models():
        build = build_open_clip
    else:
        raise Refusal(f"{name}: no name of open_clip or timm (weights of a file: NAME:FILE)")
    set_seed(seed)
    try:
        network = build(family, weights, image_size)
    except Exception as error:  # the libraries raise anything
        lines = [line.strip()[:110] for line in str(error).splitlines()[:3]]
        raise Refusal(f"{name}: {' '.join(lines) or type(error).__name__}") from error
    return network.eval().to(memory_format=torch.channels_last)  # convolutions are faster

def build_timm(name, weights, image_size):
    """Network of timm. Raises Refusal where its logits are no linear layer on its features."""
    options = {"pretrained": weights != "none"}
    if weights not in ("", "none"):
        if not Path(weights).is_file():
            raise Refusal(f"no such file {weights} from here (a tag would be {name}.TAG)")
        # Without their number a classifier of other classes would become a random one.
        layer = timm.get_pretrained_cfg(name).classifier
        classes = len(timm.models.load_state_dict(weights).get(f"{layer}.weight", ()))
        overlay = {"file": weights, "num_classes": classes, "custom_load": False}
        options = {"pretrained": True, "num_classes": classes, "pretrained_cfg_overlay": overlay}
    net = timm.create_model(name, **options).eval()
    if image_size and hasattr(net, "set_input_size"):
        net.set_input_size(img_size=image_size)  # of a ViT
    known = net.pretrained_cfg
    size = image_size or known["input_size"][-1]
    x = torch.rand(1, 3, size, size)
    classifier = net.get_classifier()
    with torch.no_grad():
        expected = net(x)
        net.reset_classifier(0)
        is_bare = isinstance(classifier, nn.Identity)
        fits = isinstance(classifier, nn.Linear) and torch.allclose(
            classifier(net(x)), expected, atol=1e-3)
        if not is_bare and not fits:
            raise Refusal("its logits are not a linear function of its features")
    network = Network(name, net, None if is_bare else classifier, size, known["mean"], known["std"])
    if weights != "none" and getattr(classifier, "out_features", 0) == 1000:
        network.class_names = timm.data.ImageNetInfo().label_names()  # in this order by custom
    return network

def build_open_clip(name, weights, image_size):
    """Network of a CLIP's image tower. OpenAI's and some other weights need QuickGELU: open_clip
    lists which, but create_model does not apply it."""
    name, _, tag = name.partition(".")
    tag = tag or weights or "openai"
    known = open_clip.get_pretrained_cfg(name, tag)
    clip = open_clip.create_model(name, pretrained=None if weights == "none" else weights or tag,
                                  force_quick_gelu=known.get("quick_gelu", False),
                                  force_image_size=image_size or None).eval()
    tower = clip.visual
    clip.visual = nn.Identity()
    looks = {**tower.preprocess_cfg, **known}
    size = int(np.max(tower.image_size))
    network = Network(f"{name}.{tag}", tower, None, size, looks["mean"], looks["std"])
    network.text = (clip.requires_grad_(False), open_clip.get_tokenizer(name))
    return network

def embed_text(text, names, templates=open_clip.OPENAI_IMAGENET_TEMPLATES):
    """phi_text(Y) (C, D), the mean over templates, and exp(logit_scale) (Sec. 4.4). ImageNet's
    wnids stand for its words; other names that are numbers raise Refusal."""
    clip, tokenizer = text
    in_words = dict(zip(timm.data.ImageNetInfo().label_names(), open_clip.IMAGENET_CLASSNAMES))
    words = [in_words.get(name, name.replace("_", " ")) for name in names]
    for word in words:
        if re.fullmatch(r"\d+|n\d{8}", word):
            raise Refusal(f"class {word}: no word for a text encoder; rename its folder")
    weight = open_clip.build_zero_shot_classifier(clip.to(DEVICE), tokenizer, words, templates,
                                                  device=DEVICE, use_tqdm=RANK == 0)
    clip.to("cpu")
    return weight.T.contiguous(), clip.logit_scale.exp().item()

def set_classes(model, names, weight, scale):
    """Gives a bare CLIP, or a student of --zero-shot, other classes: what embed_text returns."""
    if isinstance(model, Network):
        model.classifier = CosineClassifier(weight, scale, trained=False).to(weight.device)
    for module in model.modules():
        if isinstance(module, CosineClassifier):
            module.weight = F.normalize(weight, dim=-1).to(module.weight.device)
            module.scale.fill_(scale)
    model.class_names = list(names)
    model.classes = len(names)

def classifier_from(state, trained):
    """The classifier that has this state dict."""
    if "scale" in state:
        classifier = CosineClassifier(state["weight"], state["scale"], trained)
    else:
        classes, width = state["weight"].shape
        classifier = nn.Linear(width, classes, bias="bias" in state)
    classifier.load_state_dict(state)
    return classifier

# --- Files: plug-ins, whole networks, unfinished runs ---------------------------------------------

def write_file(path, kind, **content):
    """Tensors and plain data, atomically: a full disk leaves older files whole. Raises Refusal."""
    temporary = Path(f"{path}.new")
    try:
        torch.save({"kind": kind, **content}, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise Refusal(f"{path}: cannot be written ({error}); older files stay") from error

def read_file(path, kind=""):
    """What write_file wrote; no code runs. kind: "plug-in", "network" or "". Raises Refusal."""
    if not Path(path).is_file():
        raise Refusal(f"{path}: no such file; --student and --make-teacher write it, to --out")
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["kind"]
    except Exception as error:  # a broken file may raise anything
        raise Refusal(f"{path}: damaged, with code in it, or weights (NAME:{path})") from error
    if kind not in ("", found):
        raise Refusal(f"{path}: is a {found}, not a {kind}; --make-teacher writes networks")
    return content

def fingerprint(*modules):
    """sha256, in hex, of the modules' tensors in their order, wherever a network is cut."""
    total = hashlib.sha256()
    for module in modules:
        for value in module.state_dict().values():
            total.update(f"{tuple(value.shape)} {value.dtype}".encode())
            total.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()

def tuned_state(student):
    """The tensors of a plug-in: not those of backbone, original, and blocks frozen by prompts."""
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    return {name: value for name, value in student.state_dict().items()
            if name not in frozen and not name.startswith(("backbone.", "original_top."))}

def save(student, path, **progress):
    """The plug-in: what `load` needs beside the network, and progress while training."""
    write_file(path, "plug-in", config=asdict(student.config), tuned=tuned_state(student),
               class_names=student.class_names, classifier=student.original_top[1][-1].state_dict(),
               fingerprint=fingerprint(student.backbone, student.original_top), **progress)

def load(path, modules=None, class_names=None, alpha=1.0):
    """robust.pt -> RobustStudent in eval mode, on the CPU: pixels in, class probabilities out.
    modules: your own (backbone, shared, head), if tuned on such. class_names: new ones, for a
    --zero-shot student. alpha: from 0, the original, to 1, tuned (WiSE-FT [33]). Raises Refusal for
    what is no whole plug-in, or was tuned on other weights."""
    saved = read_file(path, "plug-in")
    config = Config(**saved["config"])
    student = (RobustStudent(*modules, config) if modules
               else cut(load_original(path, saved), config))
    if fingerprint(student.backbone, student.original_top) != saved["fingerprint"]:
        raise Refusal(f"{path}: tuned on other weights than {config.student or 'these'} has now")
    student.fingerprint = saved["fingerprint"]  # eval.py knows plug-ins of one original by it
    if alpha != 1 and student.recipe.tuned == "prompts":
        raise Refusal(f"{path}: alpha: the original has no prompts to interpolate with")
    state = student.state_dict()  # until now the original's, in every head
    for name, value in saved["tuned"].items():
        state[name] = torch.lerp(state[name], value, alpha) if value.is_floating_point() else value
    student.load_state_dict(state)
    student.class_names = saved["class_names"]
    if class_names is not None:
        if student.text is None:
            raise Refusal(f"{path}: only a student of --zero-shot takes new class names")
        set_classes(student, class_names, *embed_text(student.text, class_names))
    return student

def load_original(path, saved):
    """The whole Network that a plug-in was tuned from; saved: what `path` holds. Raises Refusal."""
    config = saved["config"]
    if not config["student"]:
        raise Refusal(f"{path}: was tuned on modules of your own; give them to `load`")
    network = load_network(config["student"], config["image_size"], config["seed"])
    network.classifier = classifier_from(saved["classifier"], trained=not config["zero_shot"])
    network.class_names = saved["class_names"]
    return network

def save_network(network, path, config, **progress):
    """A whole Network, for load_network. Raises Refusal."""
    write_file(path, "network", config=asdict(config), name=network.name, size=network.size,
               class_names=network.class_names, classifier=network.classifier.state_dict(),
               state=network.state_dict(), **progress)

def read_network(path):
    """The Network in a file of --make-teacher; nothing else is read or fetched. Raises Refusal."""
    saved = read_file(path, "network")
    network = load_network(f"{saved['name']}:none", saved["size"])
    network.classifier = classifier_from(saved["classifier"], trained=True)
    network.load_state_dict(saved["state"])
    network.class_names = saved["class_names"]
    network.text = None
    return network

def unfinished_run(config, kind, views):
    """What an interrupted run left in --out.part, or None where a run begins. Raises Refusal."""
    part = Path(f"{config.out}.part")
    if not part.is_file():
        if config.resume and Path(config.out).is_file():
            raise Refusal(f"--resume: {config.out} is finished; there is no {part}")
        if config.resume:
            print("resume    nothing to resume: from the beginning")
        return None
    if not config.resume:
        raise Refusal(f"{part}: left by an interrupted run; go on with --resume, or remove it")
    saved = read_file(part, kind)
    if saved["class_names"] != views.classes:
        raise Refusal(f"--resume: {part} was trained on other classes than {config.data} has")
    for name, before in saved["config"].items():
        now = getattr(config, name)
        if now != before and name not in ("data", "out", "teacher", "workers", "resume"):
            raise Refusal(f"--resume: --{name} was {before}, is now {now}; or remove {part}")
    print(f"resume    after epoch {saved['epoch']} of {config.epochs}")
    return saved

# --- The demo, on drawn patterns, with no download; main -----------------------------------------

@timm.models.register_model
def robustify_demo(pretrained=False, **options):
    """A narrow ResNet of 0.2 M parameters, whose last two of ten blocks hold about a fifth."""
    return timm.models.resnet18(layers=[1, 1, 2, 6], channels=[16, 32, 32, 32], stem_type="deep",
                                stem_width=8, **options)

def draw(kind, rng):
    """Stripes, checks, rings, a grid, waves or spokes, 64 px, of any direction and colour."""
    y, x = np.mgrid[-32:32, -32:32] + rng.uniform(-16, 16, (2, 1, 1))
    direction = rng.uniform(0, np.pi)
    scale = rng.uniform(0.4, 0.9)
    a = scale * (x * np.cos(direction) + y * np.sin(direction))  # along the direction
    b = scale * (y * np.cos(direction) - x * np.sin(direction))  # across it
    patterns = (np.sin(a), np.sin(a) * np.sin(b), np.sin(np.hypot(a, b)),
                np.maximum(np.sin(a), np.sin(b)), np.sin(a + 2 * np.sin(b / 2)),
                np.sin(8 * np.arctan2(a, b)))
    contrast = rng.uniform(25, 60, 3) * rng.choice([-1, 1], 3)
    pixels = rng.uniform(60, 196, 3) + patterns[kind][..., None] * contrast
    pixels += rng.normal(0, 8, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

def demo(folder="demo"):
    """Draw images, train a stand-in for the large student and a robust teacher, tune the student by
    the method and by its baseline APT."""
    rng = np.random.default_rng(0)
    for i in range(2200):
        path = Path(folder, "train" if i < 1600 else "val", f"kind{i % 6}", f"{i:04}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(i % 6, rng).save(path)
    for left in Path(folder).glob("*.part"):
        left.unlink()
    student = f"{folder}/student.pt"
    teacher = f"{folder}/teacher.pt"
    common = Config(data=folder, severity=4, batch_size=64, workers=2)
    new = replace(common, image_size=64, make_teacher="robustify_demo:none", lr=8e-3)
    make_teacher(replace(new, augment="none", epochs=10, out=student))
    make_teacher(replace(new, epochs=12, out=teacher))
    for recipe in ("three-heads", "apt"):
        robustify(replace(common, student=student, teacher=teacher, recipe=recipe, lr=5e-3,
                          epochs=7, out=f"{folder}/{recipe}.pt"))
    print("\nNow measure what lies in demo/: python eval.py")

def refuse(message):
    """Raises Refusal: what argparse does with an error."""
    raise Refusal(message)

def parse(arguments):
    """Config of the command line. Raises Refusal."""
    parser = argparse.ArgumentParser(
        usage="robustify.py --student NAME --teacher FILE.pt [--data FOLDER] [--FLAG VALUE ...]",
        epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = refuse
    comments = dict(re.findall(r"(\w+): \w+ = .*?  # (.*)", inspect.getsource(Config)))
    choices = {**CHOICES, "recipe": RECIPES}
    for field in fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        comment = comments.get(field.name, "").replace("%", "%%") + " [%(default)s]"
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=comment)
        else:
            parser.add_argument(flag, type=field.type, default=field.default, help=comment,
                                choices=choices.get(field.name))
    return Config(**vars(parser.parse_args(arguments)))

def join_processes():
    """Under torchrun: join the other processes, each on its own GPU."""
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process prints
    if PROCESSES > 1:
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo")

def run(arguments):
    """Do what the command line asks for. Raises Refusal and OSError."""
    config = parse(arguments)
    if min(config.epochs, config.passes, config.seed + 1) < 1:
        raise Refusal("--epochs and --passes begin at 1, --seed at 0")
    if not arguments:
        return demo()
    if bool(config.student) == bool(config.make_teacher):
        raise Refusal("give --student or --make-teacher, or no argument at all for the demo")
    out = Path(config.out).resolve()
    names = (config.student, config.teacher, config.make_teacher)
    is_input = out in [Path(name.rpartition(":")[2]).resolve() for name in names]
    if is_input or out.suffix != ".pt" or not os.access(out.parent, os.W_OK):
        raise Refusal(f"--out {config.out}: must be NAME.pt, no input, in a writable folder")
    join_processes()
    if config.student:
        robustify(config)
    else:
        make_teacher(config)
    print(f"wrote it; with unseen images: python eval.py --data DIR --corrupt --model {config.out}")

def main(run=run):
    """run(command line) -> exit code: 2 for a Refusal or OSError, in one line; 130 for Ctrl-C."""
    logging.disable(logging.ERROR)  # open_clip logs what a Refusal says
    program = Path(sys.argv[0]).name
    try:
        run(sys.argv[1:])
    except (Refusal, OSError) as error:
        reason = str(error).rpartition("Refusal: ")[2]  # without the traceback of a worker
        print(f"{program}: {' '.join(reason.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted; --resume goes on after a whole epoch", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
