"""Efficiently Robustify Pre-Trained Models (Jain, Behl, Rawat, Vineet; ICCV 2023), in one file.

A network is robust where it stays accurate on images that differ from its training images in noise,
blur, weather, style or camera. Fine-tuning all of a large network on augmented images buys that at
the cost of the whole backward pass, and the network forgets what pre-training taught it. Here the
large network (the student) stays frozen but for its last fifth of parameters, which is tuned under
three heads. A frozen copy of the original student teaches the clean and the combined head on clean
examples; a small robust network (the teacher) teaches the unclean and the combined head on
augmented ones. At test time MC dropout tells how uncertain each head is; the clean or the unclean
head answers, whichever has the smaller product of uncertainty and KL divergence to the combined.

    python robustify.py                                              # the demo, into demo/
    python robustify.py --make-teacher vit_b_16 --data imagenet/ --out vit_b16.pt
    python robustify.py --student ViT-L-14 --teacher vit_b16.pt      # writes robust.pt
    torchrun --nproc-per-node 8 robustify.py --student ViT-L-14 --teacher vit_b16.pt

    paper              where       here                              shape or value
    M = M_h M_s M_b    Eq. 1       backbone, shared, heads[name]     RobustStudent; assemble cuts
    M, the original    Sec. 4.3.1  backbone, then original           frozen
    M_t                Sec. 4.2    teacher                           a small Network, frozen
    D^a                Sec. 4.3    TrainingViews                     clean and augmented images
    c, m, u            Sec. 4.3.1  "clean", "combined", "unclean"    HEADS
    L_c, L_d           Sec. 4.3.1  cross_entropy, distillation       (B,), a value for each example
    L_clean, L_aug, L  Eqs. 3-5    student_loss                      beta (B,), 1 where is_clean
    P(theta | ...)     Eq. 2       fit                               the training loop
    phi, U_mc, K       Sec. 4.3.2  phi, uncertainty, passes          (B, C), (B,); mc_dropout
    h_f                Eq. 6       select_head                       (B,) index into HEADS
    phi_v, phi_text    Sec. 4.4    CosineClassifier                  (B, D) -> (B, C)

Trailing comments give shapes: B images, C classes, K passes, D features. "Not in the paper" marks
each decision that is ours; "Where we decide" in the README says why.

[6] Gal, Ghahramani: Dropout as a Bayesian approximation. [10] Hendrycks et al.: The many faces of
robustness (DeepAugment, Noise2Net). [12] Hendrycks et al.: AugMix. [15] Hinton, Vinyals, Dean:
Distilling the knowledge in a neural network. [33] Wortsman et al.: Robust fine-tuning of zero-shot
models (WiSE-FT).
"""

import argparse
import contextlib
import copy
import hashlib
import inspect
import io
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import open_clip
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

HEADS = ("clean", "combined", "unclean")  # "unclean" learns from augmented examples
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RANK = int(os.environ.get("RANK", 0))  # of this process; torchrun sets both
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))

class Refusal(Exception):
    """Something the user can mend; `main` prints it as one line and exits with code 2."""

@dataclass
class Config:
    """Every setting, one flag each; the defaults are the recipe."""

    student: str = ""  # network to robustify: open_clip, timm, torchvision NAME, NAME:FILE, or .pt
    teacher: str = ""  # Sec. 4.2: small robust network, named likewise
    make_teacher: str = ""  # Sec. 4.2: train this network whole on D^a instead, and save it
    data: str = "imagenet"  # folder with train/ and val/ of class folders, or train/ itself
    out: str = ""  # file to write; default robust.pt, or teacher.pt with --make-teacher
    pretrained: str = ""  # TAG, FILE or none; default: openai for open_clip, else the library's own
    image_size: int = 0  # input size in pixels; 0: the network's own. As the next, not of --teacher
    model_args: dict = None  # JSON, keyword arguments that shape the network: '{"depth": 6}'
    recipe: str = "three-heads"  # a row of RECIPES: the method, or a baseline of Sec. 5
    fraction: float = 0.20  # Table 5: tuned share, M_s and one head; which row is not in the paper
    head_blocks: int = 1  # Sec. 4.1: last blocks that belong to each head; number not in the paper
    zero_shot: bool = False  # Sec. 4.4: the text embeddings stay the classifier
    augment: Literal["augmix", "augmix+deepaugment", "none"] = "augmix+deepaugment"  # Sec. 4.2
    severity: int = 2  # torchvision's AugMix scale: 2 is published 1 (ImageNet), 4 is 3 (CIFAR)
    jsd: float = 0.0  # [12]: weight of Jensen-Shannon in --make-teacher; published: 12
    temperature: float = 2.0  # T of the distillation loss; not in the paper
    distill_weight: float = 1.0  # weight of L_d beside L_c; not in the paper
    dropout: float = 0.1  # Sec. 4.3.2: rate before each classifier; rate not in the paper
    block_dropout: float = 0.05  # Sec. 4.3.2: rate in tuned blocks; rate not in the paper
    passes: int = 10  # Sec. 4.3.2: MC dropout passes K; number not in the paper
    rule: Literal["kl-u", "u", "kl", "confidence"] = "kl-u"  # Eq. 6; the others are ablations
    lr: float = 3e-5  # peak of the schedule; this and the next four as in [33], not in the paper
    weight_decay: float = 0.1  # AdamW's, of weights that are no vectors
    warmup: int = 500  # steps to the peak, at most a fifth of all; then cosine decay
    epochs: int = 10
    batch_size: int = 512  # images a step, over all processes
    limit: int = 0  # use so many training images, drawn by the seed; 0: all
    seed: int = 0  # of new weights, order, views and dropout masks
    workers: int = min(8, os.cpu_count() or 1)  # data loading processes, for each process
    device: Literal["cuda", "cpu"] = ""  # default: cuda where torch finds a GPU
    resume: bool = False  # go on from the state that an interrupted run left beside --out
    save_every: int = 0  # steps between such states; 0: after each epoch

    def __post_init__(self):
        if not self.device:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        check_settings(self)

# --- The student: M = M_h . M_s . M_b (Eq. 1) under three heads (Sec. 4.1, Figure 4) --------------

class BranchDropout(nn.Module):
    """A residual block with dropout, while training, on what it adds to its input.

    It acts in training alone: U comes from the dropout before the classifier. Sec. 4.3.2 wants
    dropout from M_s on; the place is not in the paper. Dropping values of the sum at p = 0.1 would
    be noise of a third of the signal. What a block adds is its output minus its input, also where
    it ends with a ReLU. A block that changes the shape has no dropout.
    """

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.dropout = nn.Dropout(0.0)  # RobustStudent sets the rate

    def forward(self, x):
        y = self.block(x)
        if isinstance(self.block, ClassTokenBlock):
            x = x[:, :1]  # it adds to the class token alone
        if not self.training or y.shape != x.shape:
            return y
        return x + self.dropout(y - x)

class CosineClassifier(nn.Module):
    """scale * normalize(f) . normalize(W), (..., D) -> (..., C): the dot product of Sec. 4.4, as
    CLIP has it. W (C, D) starts at the text embeddings. Visual evaluation (VE) trains W, zero-shot
    mode (ZS) does not; the scale is never trained."""

    def __init__(self, weight, scale, trained):
        super().__init__()
        kind = nn.Parameter if trained else nn.Buffer
        self.weight = kind(F.normalize(weight.float(), dim=-1))
        self.scale = nn.Buffer(torch.as_tensor(scale, dtype=torch.float32))

    def forward(self, features):
        # In bfloat16, at CLIP's scale of 100, the logits would be wrong by 0.1.
        with torch.autocast(features.device.type, enabled=False):
            features = F.normalize(features.float(), dim=-1)
            return self.scale * features @ F.normalize(self.weight.float(), dim=-1).T

    @torch.no_grad()
    def renormalise(self):
        """Rows back to length 1 (not in the paper): forward ignores it, but a short row has a large
        gradient."""
        self.weight.copy_(F.normalize(self.weight, dim=-1))

class Head(nn.Module):
    """M_h: last blocks, pooling, norm and projection; then dropout and the classifier."""

    def __init__(self, head, dropout):
        super().__init__()
        layers = list(head) if isinstance(head, nn.Sequential) else [head]
        self.body = nn.Sequential(*layers[:-1])
        self.dropout = nn.Dropout(dropout)
        self.classifier = layers[-1]

    def features(self, h):
        """h, what M_s gives -> (B, D), what the classifier sees."""
        return self.body(h)

    def forward(self, h):
        return self.classifier(self.dropout(self.features(h)))

class Prediction(NamedTuple):
    """What `RobustStudent.predict` returns."""

    probabilities: torch.Tensor  # (B, C), phi of the chosen head
    head: torch.Tensor           # (B,), index into HEADS
    uncertainty: torch.Tensor    # (B,), U_mc of the chosen head, 0 to 0.5; small where C is large
    phi: dict                    # {head name: (B, C)}

class RobustStudent(nn.Module):
    """The student of Figure 4: M_b frozen, M_s and heads tuned copies. Beside them the original:
    M as it is given here, so after the linear probe where there was one.

    backbone: pixels (B, 3, H, W) in [0, 1] -> activations z. shared: z -> h, an nn.Sequential,
    maybe empty. head: h -> logits (B, C), an nn.Sequential that ends with the classifier, which
    has a `weight` (C, D), or the classifier alone. Any network serves that can be written as three
    such modules; BranchDropout around a residual block of yours gives it dropout. The backbone is
    frozen in place, the others are copied.

    >>> block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    >>> backbone = nn.Conv2d(3, 8, 3, stride=2)
    >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    >>> student = RobustStudent(backbone, nn.Sequential(block), head, Config(epochs=1))
    >>> teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))  # yours is a robust one
    >>> pixels, labels = torch.rand(6, 3, 32, 32), torch.arange(6) % 4
    >>> is_clean = torch.arange(6) < 3
    >>> loss = student_loss(student.train(), teacher, pixels, labels, is_clean)
    >>> student.eval().predict(pixels).probabilities.shape
    torch.Size([6, 4])

    `fit` trains it, `save` writes it, `load(file, backbone, shared, head)` reads it.
    """

    # `assemble` fills these in from a Network; with three modules of your own they stay None.
    size = class_names = class_token = text_embeddings = source = None
    trains_statistics = False  # of batch norm

    def __init__(self, backbone, shared, head, config=None):
        super().__init__()
        self.config = config or Config()
        self.recipe = RECIPES[self.config.recipe]
        self.backbone = backbone.requires_grad_(False)                         # M_b
        self.original = nn.Sequential(copy.deepcopy(shared), copy.deepcopy(head))
        self.original.requires_grad_(False)
        self.shared = copy.deepcopy(shared).requires_grad_(True)               # M_s
        self.heads = nn.ModuleDict()                                           # M_h, once a head
        for name in self.recipe.heads:
            self.heads[name] = Head(copy.deepcopy(head), self.config.dropout).requires_grad_(True)
        for module in [*self.shared.modules(), *self.heads.modules()]:
            if isinstance(module, BranchDropout):
                module.dropout.p = self.config.block_dropout
        for module in self.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # BranchDropout, heads and original read an input again
        self.classes, width = self.heads["combined"].classifier.weight.shape   # C, D
        self.masks = nn.Buffer(dropout_masks(self.config, width))              # (K, D)
        self.eval()

    def train(self, mode=True):
        """Training mode, of the tuned part alone. Batch-norm statistics stay those of pre-training
        (not in the paper), unless random weights are trained from the pixels on."""
        super().train(mode)
        self.backbone.eval()
        self.original.eval()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not self.trains_statistics:
                module.eval()
        return self

    def forward(self, pixels):
        """pixels (B, 3, H, W) in [0, 1] -> class probabilities (B, C)."""
        return self.predict(pixels).probabilities

    @torch.no_grad()
    def predict(self, pixels):
        """pixels (B, 3, H, W) in [0, 1] -> Prediction; in eval mode nothing is random."""
        return self.predict_from(self.backbone(pixels))                        # M_b

    @torch.no_grad()
    def predict_from(self, z):
        """z, what M_b gives -> Prediction (Sec. 4.3.2).

        The paper passes K times through each head. Here only the classifier runs K times, since it
        alone follows the last dropout; K passes through all tuned blocks would cost K times as much
        (that they can be spared is not in the paper). Recipes of one head predict likewise.
        """
        h = self.shared(z.clone())                                             # M_s
        phi = {}
        uncertainty = {}
        for name, head in self.heads.items():                                  # M_h
            features = head.features(h.clone())  # a head may work in place
            phi[name], uncertainty[name] = mc_dropout(head.classifier, features, self.masks)
        chosen = select_head(phi, uncertainty, self.config.rule)               # Eq. 6
        return Prediction(of_chosen_head(phi, chosen), chosen,
                          of_chosen_head(uncertainty, chosen), phi)

    @torch.no_grad()
    def original_probabilities(self, z):
        """z, what M_b gives -> class probabilities (B, C) of the untouched M."""
        return self.original(z.clone()).float().softmax(-1)

# --- The loss (Sec. 4.3.1) ------------------------------------------------------------------------

def distillation(student_logits, teacher_logits, temperature):
    """L_d [15]: T^2 KL(teacher_T || student_T) of logits (n, C) -> (n,), in nats, in float32."""
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * divergence

def student_loss(student, teacher, pixels, labels, is_clean):
    """Eqs. 3 to 5: pixels (B, 3, H, W) in [0, 1], labels (B,), is_clean (B,) bool -> scalar.

    Under three heads a clean example has the original M as its teacher and reaches the clean and
    the combined head; an augmented example has the robust teacher and reaches the unclean and the
    combined head. No augmented example moves the clean head, nor a clean one the unclean head.
    (Eqs. 3 and 4 name one teacher; that each kind has its own is the text of Secs. 4.3.1 and 5.)
    All of them move M_s. Other recipes lack heads, or teachers: without one, labels alone.
    """
    recipe = student.recipe
    learns = {"clean": is_clean, "combined": torch.ones_like(is_clean), "unclean": ~is_clean}
    with torch.no_grad():
        z = student.backbone(pixels)                        # M_b, once for student and original
        teacher_logits = torch.zeros(len(labels), student.classes, device=z.device)
        has_teacher = torch.zeros(len(labels), device=z.device)
        teachers = ((recipe.clean_teacher, is_clean), (recipe.augmented_teacher, ~is_clean))
        for who, taught in teachers:
            if who == "original":
                teacher_logits[taught] = student.original(z[taught]).float()
            elif who == "robust":
                teacher_logits[taught] = teacher(pixels[taught]).float()  # it resizes them
            has_teacher[taught] = float(who != "nobody")
    h = student.shared(z)                                   # M_s
    loss = {name: torch.zeros(len(labels), device=z.device) for name in HEADS}
    for name, head in student.heads.items():
        own = learns[name]  # the examples that reach this head; of others it has the loss 0
        logits = head(h[own])                               # M_h
        L_c = F.cross_entropy(logits.float(), labels[own], reduction="none")
        L_d = distillation(logits, teacher_logits[own], student.config.temperature)
        loss[name][own] = L_c + student.config.distill_weight * has_teacher[own] * L_d
    L_clean = loss["clean"] + loss["combined"]              # Eq. 3, (B,), for clean examples
    L_aug = loss["unclean"] + loss["combined"]              # Eq. 4, (B,), for augmented examples
    beta = is_clean.float()
    return (beta * L_clean + (1 - beta) * L_aug).mean()     # Eq. 5

# --- Head selection (Sec. 4.3.2) ------------------------------------------------------------------

def dropout_masks(config, width):
    """K masks of inverted dropout (K, D), D = width: 0, or 1 / (1 - rate) where a feature is kept.
    They are drawn once, for all images and heads, and saved with the student, so that a prediction
    depends on its image alone (not in the paper)."""
    keep = 1 - config.dropout
    generator = torch.Generator().manual_seed(config.seed)
    draws = torch.rand(config.passes, width, generator=generator)
    return (draws < keep) / keep

def mc_dropout(classifier, features, masks):
    """MC dropout [6]: features (B, D), masks (K, D) -> phi (B, C), U_mc (B,).

    phi is the mean over passes of the softmax, U_mc its standard deviation over passes. That the
    "outputs" of Sec. 4.3.2 are probabilities, and that C deviations make one number by their mean,
    is not in the paper.
    """
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

    phi {head: (B, C)}, uncertainty {head: (B,)}. The other rules are the paper's ablation: either
    factor alone, or the highest probability. A tie goes to the clean head (not in the paper). A
    combined head alone is chosen whatever the rule. Raises ValueError for an unknown rule.
    """
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
        else:
            raise ValueError(f"unknown rule {rule}")
    prefers_clean = score["clean"] <= score["unclean"]
    return torch.where(prefers_clean, HEADS.index("clean"), HEADS.index("unclean"))

def of_chosen_head(values, chosen):
    """values {head: (B, ...)}, chosen (B,) index into HEADS -> (B, ...), each row its head's."""
    every = torch.stack([values.get(name, values["combined"]) for name in HEADS])  # (3, B, ...)
    return every[chosen, torch.arange(len(chosen), device=chosen.device)]

# --- Recipes: the method, and the baselines of Sec. 5 ---------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """What distinguishes the methods: no code asks for a recipe's name, but what its row says."""

    heads: tuple            # which of HEADS are tuned; "combined" is always one
    clean_teacher: str      # of clean examples: "original", "robust" or "nobody"
    augmented_teacher: str  # of augmented examples, likewise
    cut: str                # tuning begins at "pixels", the "part" of --fraction, or "features"
    views: str              # of "both" kinds, or "clean" alone

# In the paper's text single-teacher is "Only K.D." and combined-head is "combined head"; we take
# them for the rows "Single-Teacher" and "Only K.D." of its tables. With --zero-shot, ft and apt are
# ZS-Full and ZS-APT. Baselines too have dropout and the mean over K passes (not in the paper).
RECIPES = {
    "three-heads":    Recipe(HEADS, "original", "robust", "part", "both"),
    "combined-head":  Recipe(("combined",), "original", "robust", "part", "both"),
    "single-teacher": Recipe(("combined",), "robust", "robust", "part", "both"),
    "apt":            Recipe(("combined",), "nobody", "nobody", "part", "both"),
    "lp":             Recipe(("combined",), "nobody", "nobody", "features", "clean"),
    "ft":             Recipe(("combined",), "nobody", "nobody", "pixels", "clean"),
    "ft-augmented":   Recipe(("combined",), "nobody", "nobody", "pixels", "both"),
}

# --- Data: D^a, clean and augmented views (Secs. 4.2, 4.3) ----------------------------------------

def image_folder(folder):
    """([(path, label)], class names) of a folder of class folders; raises Refusal, naming it."""
    try:
        found = torchvision.datasets.ImageFolder(folder)
    except OSError as error:
        reason = str(error).split(" Supported")[0]
        raise Refusal(f"{folder}: {reason} Expected CLASS/IMAGE files, or train/ and val/ that "
                      "hold them.") from error
    if set(found.classes) <= {"train", "training", "val", "valid", "validation", "test"}:
        raise Refusal(f"{folder}: holds {', '.join(found.classes)}: parts of a data set, not "
                      "classes; name one of them")
    return found.samples, found.classes

def read_image(path):
    """uint8 (3, H, W) of an image file, not turned by its EXIF (not in the paper, but custom);
    raises Refusal."""
    try:
        image = Image.open(path)
        if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip to white
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("32 bits of grey, of unknown range")
        return v2.functional.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # a broken file may raise anything
        raise Refusal(f"{path}: cannot be read ({error}); mend or replace it") from error

@contextlib.contextmanager
def own_randomness(*numbers):
    """Within, the CPU's generator is seeded by `numbers` and one thread computes, so that what is
    made is the same in any process at any time; the generator outside goes on as it was."""
    seed = np.random.SeedSequence(numbers).generate_state(1)[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads round convolutions differently
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))  # torch.manual_seed reseeds GPUs too
            yield
    finally:
        torch.set_num_threads(threads)

def noise2net(image):
    """DeepAugment's form without weights [10]: y + eps f(y), four times, of one image (3, H, W) in
    [0, 1]; f is a Res2Net block of random weights. The published f has 64 channels, and adds
    nothing to the group that it convolves first; this one changes the image as much (RMS 0.20) at a
    fifth of the cost (not in the paper)."""
    def convolution(x, channels, kernel, dilation):
        bound = (x.shape[1] * kernel**2) ** -0.5
        weight = torch.empty(channels, x.shape[1], kernel, kernel).uniform_(-bound, bound)
        x = F.conv2d(x, weight, padding=kernel // 2 * dilation, dilation=dilation)
        return F.instance_norm(x)  # of this image alone, so that its batch does not matter

    mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    y = ((image - mean) / std)[None]
    eps = torch.empty(()).uniform_(0.375, 0.75)
    for _ in range(4):
        groups = F.relu(convolution(y, 16, 1, 1)).chunk(4, dim=1)
        outputs = [groups[0]]
        for group in groups[1:]:
            kernel = 1 if torch.rand(()) < 0.5 else 3
            dilation = int(torch.randint(1, 4, ()))
            outputs.append(F.relu(convolution(group + outputs[-1], 4, kernel, dilation)))
        y = y + eps * convolution(torch.cat(outputs, dim=1), 3, 1, 1)
    return (y[0] * std + mean).clamp(0, 1)

def centre_crop(size):
    """The view for measuring: images of up to 64 px whole, larger ones as ImageNet is measured:
    Resize 256, CenterCrop 224, or likewise (not in the paper; CLIP's and timm's own differ)."""
    resized = size * 256 // 224 if size > 64 else size
    return v2.Compose([v2.Resize(resized), v2.CenterCrop(size)])

class CentreViews(Dataset):
    """For measuring: index -> (image uint8 (3, size, size), label); nothing random."""

    def __init__(self, samples, size):
        self.samples = samples
        self.crop = centre_crop(size)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return self.crop(read_image(path)), label

class TrainingViews(Dataset):
    """D^a: (epoch, index) -> (image uint8 (3, size, size), label, is_clean).

    A fair coin makes an example clean or augmented in this epoch (not in the paper); without
    augmentation all are clean. What is random follows from (seed, epoch, index), whatever the
    processes.
    """

    def __init__(self, samples, size, augment, config):
        self.samples = samples
        self.augment = augment
        self.seed = config.seed
        crop = [v2.RandomResizedCrop(size)]
        if size <= 64:
            crop = [v2.Resize(size), v2.RandomCrop(size, padding=size // 8)]
        self.crop = v2.Compose([*crop, v2.RandomHorizontalFlip()])
        # False is not in the paper: the other operations are among ImageNet-C's corruptions.
        self.augmix = v2.AugMix(severity=config.severity, all_ops=False)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        epoch, index = key
        path, label = self.samples[index]
        with own_randomness(self.seed, epoch, index):
            view, is_clean = self.example(read_image(path))
        return view, label, is_clean

    def example(self, image):
        """image -> (view, is_clean)."""
        is_clean = bool(torch.rand(()) < 0.5) or self.augment == "none"
        view = self.crop(image)
        return (view if is_clean else self.augmented(view)), is_clean

    def augmented(self, view):
        """Noise2Net on half of the views, by a coin (not in the paper), then AugMix."""
        if self.augment == "augmix+deepaugment" and torch.rand(()) < 0.5:
            view = (noise2net(view / 255) * 255).byte()
        return self.augmix(view)

class AugMixTriples(TrainingViews):
    """(epoch, index) -> (uint8 (3, 3, size, size), label, True): a clean view, two augmented."""

    def example(self, image):
        clean = self.crop(image)
        return torch.stack([clean, self.augmented(clean), self.augmented(clean)]), True

def batches(dataset, keys, batch_size, workers):
    """Yields batches of dataset[key] for `keys`, in order; raises the Refusal of an item."""
    # A sampler may yield any key: DataLoader hands it to __getitem__.
    loader = DataLoader(dataset, batch_size, sampler=keys, num_workers=workers,
                        pin_memory=torch.cuda.is_available())
    try:
        yield from loader
    except Refusal as error:  # in a worker torch puts its traceback before the message
        raise Refusal(str(error).rpartition("Refusal: ")[2]) from error

def centre_batches(samples, size, config, title):
    """Yields (pixels in [0, 1], labels), on the device, of this process's share of `samples`."""
    share = range(RANK, len(samples), PROCESSES)
    per_process = max(1, config.batch_size // PROCESSES)
    loader = batches(CentreViews(samples, size), share, per_process, config.workers)
    for images, labels in tqdm(loader, title, -(-len(share) // per_process), disable=RANK > 0):
        yield images.to(config.device) / 255, labels.to(config.device)

# --- The training loop (Eq. 2) --------------------------------------------------------------------

def count_steps(count, config):
    """(images a step and process, steps an epoch) of `count` training images; an epoch's last,
    smaller batch is left out. Raises Refusal."""
    per_process = min(config.batch_size, count) // PROCESSES
    if per_process == 0:
        raise Refusal(f"--batch-size {config.batch_size}, {count} images: too few for {PROCESSES} "
                      "processes")
    return per_process, count // (per_process * PROCESSES)

def training_keys(count, config, first_step):
    """Yields the (epoch, index) keys of this process's share of the steps from `first_step` on. The
    order follows from (seed, epoch): equal step sizes hold the same images on any number of
    processes."""
    per_process, per_epoch = count_steps(count, config)
    size = per_process * PROCESSES
    for epoch in range(first_step // per_epoch, config.epochs):
        order = np.random.default_rng((config.seed, epoch)).permutation(count)
        for place in range(max(0, first_step - epoch * per_epoch), per_epoch):
            for index in order[place * size:(place + 1) * size][RANK::PROCESSES]:
                yield epoch, int(index)

def learning_rate(step, total, config):
    """Linear warm-up, then half a cosine down to 0 [33]."""
    warmup = min(config.warmup, total // 5)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

def make_optimizer(student, config):
    """AdamW; no decay of vectors (biases, norms), nor of what a CosineClassifier divides out."""
    cosine = [m.weight for m in student.modules() if isinstance(m, CosineClassifier)]
    decayed = []
    others = []
    for p in student.parameters():
        if p.requires_grad and p.ndim > 1 and not any(p is weight for weight in cosine):
            decayed.append(p)
        elif p.requires_grad:
            others.append(p)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)

def autocast(device):
    """bfloat16 on a GPU, where it needs no scaling of the loss; float32 on a CPU."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")

def training_step(student, optimizer, loss_of, batch, config):
    """One update with batch = (images uint8, labels, is_clean); returns the loss, a float. Raises
    FloatingPointError, before the update, where the loss or a gradient is not finite."""
    images, labels, is_clean = (t.to(config.device, non_blocking=True) for t in batch)
    optimizer.zero_grad()
    with autocast(config.device):
        loss = loss_of(images / 255, labels, is_clean)
    loss.backward()
    tuned = [p for p in student.parameters() if p.requires_grad]
    if PROCESSES > 1:
        for p in tuned:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            torch.distributed.all_reduce(p.grad)
            p.grad /= PROCESSES
    norm = nn.utils.clip_grad_norm_(tuned, 1.0)  # as in [33], not in the paper
    if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
        raise FloatingPointError(f"loss {loss.item()}, gradient norm {norm.item()}")
    optimizer.step()
    for module in student.modules():
        if isinstance(module, CosineClassifier) and module.weight.requires_grad:
            module.renormalise()
    return loss.item()

def fit(student, loss_of, views, config, write):
    """Eq. 2: minimise loss_of(pixels, labels, is_clean) over theta_s and theta_h.

    views: TrainingViews. write(): saves the student, after each epoch; the last one is kept, none
    is chosen on val/. Dropout follows from (seed, rank, step), views and order from the seed, so
    that --resume needs weights, optimiser and step alone. Leaves the student in eval mode. Raises
    Refusal where a loss, gradient or weight is not finite.
    """
    student.to(config.device)
    optimizer = make_optimizer(student, config)
    settings = settings_of(student, len(views), config)
    first_step = read_state(student, optimizer, settings, config) if can_resume(config) else 0
    if PROCESSES > 1:
        torch.distributed.barrier()  # all have read the state before one replaces it
    per_process, per_epoch = count_steps(len(views), config)
    steps = config.epochs * per_epoch
    if config.resume and RANK == 0:
        print(f"resume    after step {first_step} of {steps}")
    keys = training_keys(len(views), config, first_step)
    loader = batches(views, keys, per_process, config.workers)
    waited = 0.0
    started = time.perf_counter()
    with tqdm(desc="training", total=steps, initial=first_step, unit=" images", mininterval=2,
              unit_scale=per_process * PROCESSES, disable=RANK > 0) as bar:
        for step in range(first_step, steps):
            asked = time.perf_counter()
            batch = next(loader)
            waited += time.perf_counter() - asked
            seed = np.random.SeedSequence((config.seed, RANK, step)).generate_state(1)[0]
            torch.manual_seed(int(seed))  # of dropout
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, config)
            ends_epoch = (step + 1) % per_epoch == 0
            saves = ends_epoch or (config.save_every > 0 and (step + 1) % config.save_every == 0)
            try:
                loss = training_step(student.train(), optimizer, loss_of, batch, config)
                if saves:
                    check_finite(student)
            except FloatingPointError as error:
                raise not_finite(error, step, per_epoch, config) from error
            if saves:
                average_statistics(student)
            if saves and RANK == 0:
                write_state(student, optimizer, step + 1, settings, config)
            if ends_epoch and RANK == 0:
                write()
            share = waited / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {loss:.3f}, {share:.0%} waiting for data", refresh=False)
            bar.update()
    student.eval()
    if RANK == 0:
        if first_step == steps:
            write()  # an earlier run ended between its last state and this
        state_file(config).unlink(missing_ok=True)
    if PROCESSES > 1:
        torch.distributed.barrier()  # the others may read what rank 0 wrote

def not_finite(error, step, per_epoch, config):
    """The Refusal that ends a run which diverged at `step`."""
    stays = "stays as it was" if Path(config.out).is_file() else "was not written yet"
    return Refusal(f"epoch {step // per_epoch + 1}, step {step % per_epoch + 1}: {error}; "
                   f"{config.out} {stays}; try a lower --lr or --temperature")

def check_finite(student):
    """Raises FloatingPointError, naming the first tuned tensor that holds NaN or infinity."""
    for name, value in tuned_state(student).items():
        if not value.isfinite().all():
            raise FloatingPointError(f"{name} is not finite")

def average_statistics(student):
    """Where batch-norm statistics are trained each process has its own: make them the mean."""
    if PROCESSES > 1 and student.trains_statistics:
        for name, value in student.named_buffers():
            if "running" in name:
                torch.distributed.all_reduce(value)
                value /= PROCESSES

# --- The robust teacher (Sec. 4.2) ----------------------------------------------------------------

def teacher_loss(tuned, jsd, pixels, labels):
    """The published AugMix loss [12]: cross-entropy of the clean view + jsd * Jensen-Shannon
    divergence of all three; pixels (B, 3, 3, H, W), labels (B,) -> scalar."""
    views = pixels.transpose(0, 1).flatten(0, 1)                        # (3 B, 3, H, W)
    logits = tuned.heads["combined"](tuned.shared(tuned.backbone(views))).float()
    phi = logits.softmax(-1).unflatten(0, (3, -1))                      # (3, B, C)
    divergence = 0.0
    for p in phi:
        divergence = divergence + kl_divergence(p, phi.mean(0)).mean() / 3
    return F.cross_entropy(logits[:len(labels)], labels) + jsd * divergence

def save_teacher(tuned, network, path):
    """Write `network` whole, with the weights of `tuned`: cut at the pixels, its shared section and
    head hold stem, blocks, pool and classifier in order."""
    head = tuned.heads["combined"]
    stages = [*tuned.shared, *head.body]
    teacher = copy.copy(network)
    teacher._modules = {"prepare": tuned.backbone[0], "stem": stages[0],
                        "blocks": nn.Sequential(*stages[1:-1]), "pool": stages[-1],
                        "classifier": head.classifier}
    save_network(teacher, path)

# --- A run: data, the original, and what is tuned -------------------------------------------------

def train(config):
    """Sec. 4.3: cut the student, plug in its heads, tune them on D^a, write the plug-in. Raises
    Refusal.

    With --make-teacher, Sec. 4.2, the same is done by the recipe ft-augmented: one head, labels
    alone, tuned from the pixels on, with a student's dropout; --jsd adds its term. A whole network
    is written.
    """
    name = config.make_teacher or config.student
    if config.make_teacher:
        config = replace(config, recipe="ft-augmented")
    recipe = RECIPES[config.recipe]
    needs_teacher = "robust" in (recipe.clean_teacher, recipe.augmented_teacher)
    if needs_teacher and not config.teacher:
        raise Refusal(f"--recipe {config.recipe} needs --teacher FILE.pt; see --make-teacher")
    if config.zero_shot and (config.make_teacher or config.recipe == "lp"):
        raise Refusal("--zero-shot keeps the classifier: not with --make-teacher or --recipe lp")
    if config.jsd and (not config.make_teacher or config.augment == "none"):
        raise Refusal("--jsd: only with --make-teacher and augmented views")
    if config.augment == "none" and "unclean" in recipe.heads:
        raise Refusal("--augment none: the unclean head would have nothing to learn from")
    if config.dropout == 0 and config.rule in ("kl-u", "u") and "unclean" in recipe.heads:
        raise Refusal(f"--dropout 0: leaves no uncertainty for --rule {config.rule} to compare")
    resumes = can_resume(config)
    samples, class_names = training_images(config)
    teacher = load_teacher(config, class_names) if needs_teacher else None
    count_steps(len(samples), config)  # refuses before the long work
    network = load_network(name, config.pretrained, config.image_size, config.model_args,
                           config.seed)
    has_probe = give_classifier(network, class_names, config) and not resumes
    augment = "none" if recipe.views == "clean" else config.augment
    triples = config.jsd > 0
    kind = AugMixTriples if triples else TrainingViews
    views = kind(samples, network.size, augment, config)
    if RANK == 0:
        announce(name, network, views, has_probe, config)
    network.to(config.device)
    if has_probe:
        probe(network, samples, config)
    student = assemble(network, config)

    def loss_of(pixels, labels, is_clean):
        if triples:
            return teacher_loss(student, config.jsd, pixels, labels)
        return student_loss(student, teacher, pixels, labels, is_clean)

    def write():
        if config.make_teacher:
            save_teacher(student, network, config.out)
        else:
            save(student, config.out)

    fit(student, loss_of, views, config, write)

def training_images(config):
    """([(path, label)], class names) of --data; raises Refusal where the folder is wrong."""
    folder = Path(config.data)
    train_folder = folder / "train"  # or a class of this name, without folders in it
    has_folders = train_folder.is_dir() and any(path.is_dir() for path in train_folder.iterdir())
    if has_folders or (train_folder.is_dir() and (folder / "val").is_dir()):
        folder = train_folder
    samples, class_names = image_folder(folder)
    if len(class_names) < 2:
        raise Refusal(f"{folder}: holds one class folder, {class_names[0]}; give the folder that "
                      "holds all")
    if config.limit:
        drawn = np.random.default_rng(config.seed).permutation(len(samples))[:config.limit]
        samples = [samples[i] for i in sorted(drawn)]
        if config.limit < len(class_names):
            raise Refusal(f"--limit {config.limit}: take at least one image a class, of "
                          f"{len(class_names)}")
    return samples, class_names

def check_classes(what, names, expected):
    """Raises Refusal where `names` are not the classes of --data."""
    if list(names) != list(expected):
        raise Refusal(f"{what} has {len(names)} classes ({', '.join(names[:3])} ...), --data has "
                      f"{len(expected)} ({', '.join(expected[:3])} ...): they must agree")

def load_teacher(config, class_names):
    """The robust teacher, frozen; raises Refusal where its classes are not those of --data."""
    teacher = load_network(config.teacher)
    outputs = 0 if teacher.classifier is None else len(teacher.classifier.weight)
    if teacher.class_names is not None:
        check_classes(f"--teacher {config.teacher}", teacher.class_names, class_names)
    elif outputs != len(class_names):
        raise Refusal(f"--teacher {config.teacher}: has {outputs} outputs, --data has "
                      f"{len(class_names)} classes; see --make-teacher")
    elif RANK == 0:
        print(f"teacher   {config.teacher} names no classes: taken in the order of the folders")
    return teacher.to(config.device).requires_grad_(False)

def give_classifier(network, names, config):
    """Gives `network` a classifier for the classes of --data; returns whether visual evaluation
    (VE) must begin with a linear probe (Sec. 5). Raises Refusal.

    Its own classifier stays where it is known to be of these classes. Otherwise the text embeddings
    are one, where there are any: ZS takes them as they are, the probe starts from them.
    """
    if config.zero_shot and network.text_embeddings is None:
        raise Refusal(f"--zero-shot: {config.student} has no text encoder")
    if network.classifier is not None and network.class_names == names:
        return False
    network.class_names = names
    if network.text_embeddings is not None:
        weight, scale = network.text_embeddings(names, device=config.device)
        network.classifier = CosineClassifier(weight, scale, trained=not config.zero_shot)
    else:
        with torch.no_grad(), own_randomness(config.seed, 1):  # not as its other weights
            features = network.features(torch.zeros(1, 3, network.size, network.size))
            network.classifier = nn.Linear(features.shape[1], len(names))
    return not config.zero_shot and not network.is_random  # random features are worth no probe

def probe(network, samples, config):
    """Fits the classifier to the training images, as Sec. 5 does for LP. It makes the original M
    that every recipe starts from, `lp` too. That a teacher begins with it is not in the paper: it
    keeps what it knew."""
    linear_probe(*all_features(network, samples, config), network.classifier)
    if PROCESSES > 1:
        for p in network.classifier.parameters():
            torch.distributed.broadcast(p.data, src=0)

@torch.no_grad()
def all_features(network, samples, config):
    """(features (n, D), labels (n,)) of centre crops; processes share the work, all get all."""
    features = []
    labels = []
    for pixels, y in centre_batches(samples, network.size, config, "features"):
        with autocast(config.device):
            features.append(network.features(pixels).float().cpu())
        labels.append(y.cpu())
    shares = [(torch.cat(features), torch.cat(labels))]
    if PROCESSES > 1:
        mine = shares[0]
        shares = [None] * PROCESSES
        torch.distributed.all_gather_object(shares, mine)
    features = torch.cat([share[0] for share in shares]).to(config.device)
    return features, torch.cat([share[1] for share in shares]).to(config.device)

def linear_probe(features, labels, classifier, weight_decay=1e-4):
    """Fits `classifier` in place to features (n, D) and labels (n,) by L-BFGS: mean cross-entropy;
    for an nn.Linear also weight_decay * squared norm of the weight. A CosineClassifier divides its
    norm out: decay would only shrink it."""
    linear = isinstance(classifier, nn.Linear)
    if linear:
        for p in classifier.parameters():
            nn.init.zeros_(p)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=1000,
                                  line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        total = torch.zeros((), device=features.device)
        if linear:
            total = weight_decay * classifier.weight.square().sum()
            total.backward()
        for x, y in zip(features.split(8192), labels.split(8192)):
            loss = F.cross_entropy(classifier(x), y, reduction="sum") / len(labels)
            loss.backward()
            total = total + loss.detach()
        return total

    optimizer.step(objective)
    if not linear:
        classifier.renormalise()

def announce(name, network, views, has_probe, config):
    """Print what is about to happen, in one block."""
    stages = ["pixels", "stem", *(f"block {i + 1}" for i in range(len(network.blocks))), "pool"]

    def span(start, end):
        if start >= end:
            return "nothing"
        return stages[start] if end == start + 1 else f"{stages[start]} to {stages[end - 1]}"

    cut, head_start = find_cut(network, config)
    recipe = RECIPES[config.recipe]
    one = tuned_share(network, cut)
    head = tuned_share(network, head_start)
    per_process, per_epoch = count_steps(len(views), config)
    print(f"network   {name}: {count_parameters(network) / 1e6:.2f} M parameters, "
          f"{network.size} px; frozen {span(0, cut)}; shared {span(cut, head_start)}; in each head "
          f"{span(head_start, len(stages))}, classifier")
    print(f"tuned     {config.recipe}: {one:.1%} of the parameters, with all heads "
          f"{one + (len(recipe.heads) - 1) * head:.1%}")
    if recipe.cut == "part" and abs(one - config.fraction) > 0.15 * config.fraction:
        print(f"          not --fraction {config.fraction:.1%}: one head has {head:.1%}, and only "
              "whole blocks can be shared (--head-blocks 0: none in a head)")
    teachers = {"original": "the original", "robust": config.teacher, "nobody": "labels alone"}
    print(f"heads     {', '.join(recipe.heads)}; clean examples are taught by "
          f"{teachers[recipe.clean_teacher]}, augmented by {teachers[recipe.augmented_teacher]}")
    print(f"images    {len(views)} of {len(network.class_names)} classes, augmented by "
          f"{views.augment}")
    if has_probe:
        print("probe     first a classifier for these classes; the network with it is the original")
    print(f"training  {config.epochs} epochs, {config.epochs * per_epoch} steps of "
          f"{per_process * PROCESSES} images, AdamW, lr {config.lr:g}, on {config.device}; writes "
          f"{config.out}", flush=True)

# --- Networks: where a library's network is cut ---------------------------------------------------

class Sections(NamedTuple):
    """A library's network taken apart (Sec. 4.1)."""

    stem: nn.Module            # normalised pixels -> activations
    blocks: list               # of modules, activations -> activations
    pool: nn.Module            # the last block's activations -> features (B, D)
    classifier: nn.Module      # features -> logits (B, C); None or nn.Identity in a bare tower
    class_token: bool = False  # activations are tokens (B, N, D), of which the first is pooled

class Part(nn.Module):
    """The children and parameters of `net` named in `names`, with a forward pass of their own: the
    library's methods then run on parts that can be frozen or copied apart."""

    def __init__(self, net, names, run):
        super().__init__()
        self.net = copy.copy(net)
        self.net._modules = {k: v for k, v in net._modules.items() if k in names}
        self.net._parameters = {k: v for k, v in net._parameters.items() if k in names}
        self.run = run

    def forward(self, x):
        return self.run(self.net, x)

class ClassTokenBlock(nn.Module):
    """The last block of a CLIP ViT, of which the class token alone is pooled, (B, N, D) ->
    (B, 1, D): keys and values of all tokens, query, projection and MLP of one. Exact, for a sixth
    of the cost (not in the paper). `whole` computes all tokens, as the library does: for --cost."""

    whole = False

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        block = self.block
        if self.whole:
            return block(x)[:, :1]
        tokens = block.ln_1(x)
        y = x[:, :1] + block.ls_1(block.attention(tokens[:, :1], tokens, tokens))
        return y + block.ls_2(block.mlp(block.ln_2(y)))

def split_open_clip_vit(net):
    """Sections of an open_clip VisionTransformer."""
    def stem(net, x):
        return net._embeds(x)

    def pool(net, x):
        return net._pool(x)[0] @ net.proj

    blocks = list(net.transformer.resblocks)
    pools_class_token = net.pool_type == "tok" and net.attn_pool is None
    if pools_class_token and type(blocks[-1]) is open_clip.transformer.ResidualAttentionBlock:
        blocks[-1] = ClassTokenBlock(blocks[-1])
    first = ["conv1", "class_embedding", "positional_embedding", "patch_dropout", "ln_pre"]
    last = ["attn_pool", "ln_post", "proj"]
    return Sections(Part(net, first, stem), blocks, Part(net, last, pool), None, pools_class_token)

def split_open_clip_resnet(net):
    """Sections of an open_clip ModifiedResNet."""
    def stem(net, x):
        return net.stem(x)

    first = [name for name in net._modules if not name.startswith(("layer", "attnpool"))]
    blocks = [*net.layer1, *net.layer2, *net.layer3, *net.layer4]
    return Sections(Part(net, first, stem), blocks, net.attnpool, None)

def split_timm_vit(net):
    """Sections of a timm VisionTransformer."""
    def stem(net, x):
        return net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x))))

    def pool(net, x):
        if net.global_pool == "token":
            x = x[:, :1]  # the norm of the others would be for nothing
        return net.forward_head(net.norm(x), pre_logits=True)

    first = ["patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "patch_drop",
             "norm_pre"]
    last = ["norm", "attn_pool", "fc_norm", "head_drop"]
    return Sections(Part(net, first, stem), list(net.blocks), Part(net, last, pool),
                    net.get_classifier(), net.global_pool == "token")

def split_timm_resnet(net):
    """Sections of a timm ResNet."""
    def stem(net, x):
        return net.maxpool(net.act1(net.bn1(net.conv1(x))))

    def pool(net, x):
        return net.forward_head(x, pre_logits=True)

    blocks = [*net.layer1, *net.layer2, *net.layer3, *net.layer4]
    first = Part(net, ["conv1", "bn1", "act1", "maxpool"], stem)
    return Sections(first, blocks, Part(net, ["global_pool"], pool), net.get_classifier())

def split_timm_efficientnet(net):
    """Sections of a timm EfficientNet."""
    def stem(net, x):
        return net.bn1(net.conv_stem(x))

    def pool(net, x):
        return net.forward_head(net.bn2(net.conv_head(x)), pre_logits=True)

    blocks = [block for stage in net.blocks for block in stage]
    return Sections(Part(net, ["conv_stem", "bn1"], stem), blocks,
                    Part(net, ["conv_head", "bn2", "global_pool"], pool), net.get_classifier())

def split_torchvision_vit(net):
    """Sections of a torchvision VisionTransformer."""
    def stem(net, x):
        tokens = torch.cat([net.class_token.expand(len(x), -1, -1), net._process_input(x)], dim=1)
        return net.dropout(tokens + net.pos_embedding)

    def pool(net, x):
        return net.heads(net.ln(x[:, 0]))

    for name in ("pos_embedding", "dropout", "ln"):
        setattr(net, name, getattr(net.encoder, name))
    classifier = net.heads.head
    net.heads.head = nn.Identity()
    first = Part(net, ["conv_proj", "class_token", "pos_embedding", "dropout"], stem)
    return Sections(first, net.encoder.layers, Part(net, ["ln", "heads"], pool), classifier, True)

FAMILIES = {
    "open_clip VisionTransformer": split_open_clip_vit,
    "open_clip ModifiedResNet": split_open_clip_resnet,
    "timm VisionTransformer": split_timm_vit,
    "timm ResNet": split_timm_resnet,
    "timm EfficientNet": split_timm_efficientnet,
    "torchvision VisionTransformer": split_torchvision_vit,
}

class Preprocess(nn.Module):
    """pixels (B, 3, H, W) in [0, 1] -> (B, 3, size, size), normalised, as this network wants it."""

    def __init__(self, size, mean, std):
        super().__init__()
        self.resize = v2.Resize((size, size), v2.InterpolationMode.BICUBIC)
        self.mean = nn.Buffer(torch.tensor(mean)[:, None, None])
        self.std = nn.Buffer(torch.tensor(std)[:, None, None])

    def forward(self, pixels):
        normalised = (self.resize(pixels) - self.mean) / self.std
        return normalised.contiguous(memory_format=torch.channels_last)  # convolutions are faster

class Network(nn.Module):
    """A whole network M: pixels (B, 3, H, W) in [0, 1] -> logits (B, C). Raises Refusal where its
    family is not one of FAMILIES."""

    def __init__(self, net, size, mean, std):
        super().__init__()
        family = f"{type(net).__module__.split('.')[0]} {type(net).__name__}"
        if family not in FAMILIES:
            raise Refusal(f"cannot split a {family}: not one of {', '.join(FAMILIES)}; give "
                          "RobustStudent your own modules")
        sections = FAMILIES[family](net)
        self.prepare = Preprocess(size, mean, std)
        self.stem = sections.stem
        self.blocks = nn.Sequential(*(BranchDropout(block) for block in sections.blocks))
        self.pool = sections.pool
        self.classifier = None                  # a bare tower has none yet
        if isinstance(sections.classifier, nn.Linear):
            self.classifier = sections.classifier
        self.class_token = sections.class_token
        self.size = int(size)                   # of the input, in pixels
        self.class_names = None                 # of the outputs, None where unknown
        self.text_embeddings = None             # CLIP: (names, templates, device) -> (W, scale)
        self.is_random = False                  # its weights were never trained
        self.source = None                      # arguments of load_network that give this network
        self.architecture = None                # those that give it with random weights

    def features(self, pixels):
        """pixels (B, 3, H, W) in [0, 1] -> (B, D), what the classifier sees."""
        return self.pool(self.blocks(self.stem(self.prepare(pixels))))

    def forward(self, pixels):
        return self.classifier(self.features(pixels))

    def stages(self):
        """All but the classifier, in order: what may be frozen, shared, or in a head. A ViT-B has
        15: 0 prepare, 1 stem, 2 to 13 its blocks, 14 pool."""
        return [self.prepare, self.stem, *self.blocks, self.pool]

def copy_description(source, target):
    """Tells `target` what `source` knows of its images, classes and origin."""
    for name in ("size", "class_names", "class_token", "text_embeddings", "source"):
        setattr(target, name, getattr(source, name))

def count_parameters(*modules):
    """Number of parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())

def tuned_share(network, start):
    """Share of the network's parameters from the stage of index `start` to the classifier."""
    tuned = count_parameters(*network.stages()[start:], network.classifier)
    return tuned / count_parameters(network)

def find_cut(network, config):
    """Indices into network.stages(): where M_s begins, and where M_h begins (Sec. 4.1).

    The cut "part" brings the share of M_s and one M_h as close to config.fraction as whole blocks
    allow.
    """
    end = len(network.stages())
    head_start = max(2, end - 1 - config.head_blocks)  # prepare and stem are in no head
    if RECIPES[config.recipe].cut == "pixels":
        return 1, head_start  # stage 0, prepare, has no weights
    if RECIPES[config.recipe].cut == "features":
        return end, end
    starts = range(1, head_start + 1)
    misses = [abs(tuned_share(network, start) - config.fraction) for start in starts]
    return starts[int(np.argmin(misses))], head_start

def assemble(network, config):
    """RobustStudent of a Network, cut as config.recipe says: Eq. 1."""
    cut, head_start = find_cut(network, config)
    stages = network.stages()
    head = nn.Sequential(*stages[head_start:], network.classifier)
    shared = nn.Sequential(*stages[cut:head_start])
    student = RobustStudent(nn.Sequential(*stages[:cut]), shared, head, config)
    copy_description(network, student)
    student.trains_statistics = network.is_random and student.recipe.cut == "pixels"
    return student

# --- Networks: loading ----------------------------------------------------------------------------

# What wrong arguments and mutated files cause in the libraries' constructors and in ours.
DAMAGE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
          ValueError)

def check_model_args(model_args):
    """Raises Refusal unless the arguments only shape a network: they may come from a file, and the
    libraries' constructors also take other files, addresses and ways of unpickling."""
    if not isinstance(model_args, dict):
        raise Refusal("--model-args: must be a JSON object of keyword arguments")
    for key, value in model_args.items():
        loads = re.search("pretrained|checkpoint|weights|cache|file|url|hf|cfg|config", str(key))
        if loads or not re.fullmatch(r"[\w\s.,+\-\[\]']*", str(value)):
            raise Refusal(f"--model-args {key}: only numbers, booleans, words and lists of them, "
                          "and only what shapes a network")

def is_checkpoint(name):
    """Whether the name of a network is a file of robustify.py: no NAME:FILE, no library's name."""
    return name.endswith(".pt") and ":" not in name

def load_network(name, pretrained="", image_size=0, model_args=None, seed=0):
    """A Network by open_clip, timm or torchvision NAME, NAME:FILE, or a .pt of --make-teacher.

    pretrained: a TAG of the library, a FILE with a state dict, "none" for random weights (drawn by
    `seed`), or "" for the default. Raises Refusal.
    """
    name = str(name)
    pretrained = str(pretrained)
    if is_checkpoint(name):
        if pretrained or image_size or model_args:
            raise Refusal(f"{name}: has its own weights, size and arguments; give no --pretrained, "
                          "--image-size or --model-args")
        return read_network(name)
    family, _, file = name.partition(":")
    if file and pretrained:
        raise Refusal(f"{name}: brings its own weights; give no --pretrained {pretrained}")
    if Path(pretrained).is_file():
        file = pretrained
    weights = None
    tag = pretrained
    if file:
        weights = read_state_dict(file)
        tag = "none"
    model_args = dict(model_args or {})
    check_model_args(model_args)
    if timm.is_model(family):
        build = build_timm
    elif family in torchvision.models.list_models():
        build = build_torchvision
    elif family in open_clip.list_models():
        build = build_open_clip
    else:
        raise Refusal(f"{name}: not an open_clip, timm or torchvision name, nor a .pt file")
    try:
        for layer in ("fc", "classifier", "head", "heads.head"):  # names of classifiers
            if weights and f"{layer}.weight" in weights:
                model_args.setdefault("num_classes", len(weights[f"{layer}.weight"]))
        with own_randomness(seed):  # of random weights
            network = build(family, tag, weights, image_size, model_args)
    except (*DAMAGE, OSError) as error:
        # An unknown tag or argument, or weights that do not fit or cannot be had.
        way_out = "" if file else " (--pretrained takes TAG, FILE, none)"
        raise Refusal(f"{name}: {str(error)[:300]}{way_out}") from error
    network.source = {"name": name, "pretrained": pretrained, "image_size": image_size,
                      "model_args": model_args, "seed": seed}
    network.architecture = {"name": family, "pretrained": "none", "image_size": network.size,
                            "model_args": model_args}
    network.is_random = tag == "none" and not file
    classifier = network.classifier
    if not network.is_random and classifier is not None and classifier.out_features == 1000:
        network.class_names = timm.data.ImageNetInfo().label_names()  # by custom, in this order
    return network.eval()

def build_timm(name, tag, weights, image_size, model_args):
    """Network of timm, with the size, mean and std of its tag."""
    if image_size and re.search("vit|deit|eva|beit|aimv2", name):
        model_args["img_size"] = image_size
    if tag not in ("", "none"):
        name = f"{name}.{tag}"
    if weights is not None:
        model_args.setdefault("num_classes", 0)  # a file without classifier (MAE and the like)
    net = timm.create_model(name, pretrained=tag != "none", **model_args)
    if weights is not None:
        net.load_state_dict(weights)
    known = net.pretrained_cfg
    size = image_size or known["input_size"][-1]
    if isinstance(net, timm.models.VisionTransformer):
        size = net.patch_embed.img_size[0]  # --model-args may have set it
    return Network(net, size, known["mean"], known["std"])

def build_torchvision(name, tag, weights, image_size, model_args):
    """Network of torchvision."""
    if image_size and "vit" in name:
        model_args["image_size"] = image_size
    tag = {"": "DEFAULT", "none": None}.get(tag, tag)
    net = torchvision.models.get_model(name, weights=tag, **model_args)
    if weights is not None:
        net.load_state_dict(weights)
    size = image_size or getattr(net, "image_size", 224)
    return Network(net, size, IMAGENET_MEAN, IMAGENET_STD)

def build_open_clip(name, tag, weights, image_size, model_args):
    """Network of a CLIP's image tower. OpenAI's and some other weights need QuickGELU: open_clip
    lists which, but create_model does not apply it. It becomes one of `model_args`."""
    if tag == "":
        tag = "openai"
    if tag == "none":
        tag = None
    elif tag not in open_clip.list_pretrained_tags_by_model(name):
        tags = ", ".join(["none", *open_clip.list_pretrained_tags_by_model(name)])
        raise Refusal(f"{name}: open_clip has no weights {tag} for it; --pretrained takes {tags}")
    if tag and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"):
        model_args.setdefault("quick_gelu", True)
    clip = open_clip.create_model(name, pretrained=tag, force_image_size=image_size or None,
                                  **model_args).eval()
    if weights is not None:
        clip.load_state_dict(weights)
        if "quickgelu" not in name and "quick_gelu" not in model_args and RANK == 0:
            print(f"network   {name} has GELU; OpenAI's weights need {name}-quickgelu:FILE")
    tower = clip.visual
    clip.visual = nn.Identity()
    tokenizer = open_clip.get_tokenizer(name)

    def text_embeddings(names, templates=open_clip.OPENAI_IMAGENET_TEMPLATES, device="cpu"):
        """phi_text(Y) (C, D), the mean over templates, and exp(logit_scale) (Sec. 4.4)."""
        wnids = timm.data.ImageNetInfo().label_names()
        in_words = dict(zip(wnids, open_clip.IMAGENET_CLASSNAMES))
        names = [in_words.get(name, name.replace("_", " ")) for name in names]
        weight = open_clip.build_zero_shot_classifier(
            clip.to(device), tokenizer, names, templates, device=device, use_tqdm=RANK == 0)
        return weight.T.contiguous(), clip.logit_scale.exp().item()

    preprocess = tower.preprocess_cfg
    network = Network(tower, int(np.max(tower.image_size)), preprocess["mean"], preprocess["std"])
    network.text_embeddings = text_embeddings
    return network

def set_classes(model, names, weight, scale):
    """Gives a Network, or a RobustStudent of --zero-shot, other classes (Sec. 4.4): names, text
    embeddings (C, D) and their scale. Raises Refusal where the classifier was trained."""
    if isinstance(model, Network):
        model.classifier = CosineClassifier(weight, scale, trained=False).to(weight.device)
    elif not model.config.zero_shot:
        raise Refusal("only a student of --zero-shot takes new class names")
    for module in model.modules():
        if isinstance(module, CosineClassifier):
            module.weight = F.normalize(weight, dim=-1).to(module.weight.device)
            module.scale.fill_(scale)
    model.class_names = list(names)
    model.classes = len(names)

def classifier_from(state, zero_shot):
    """The classifier that has this state dict."""
    if "scale" in state:
        classifier = CosineClassifier(state["weight"], state["scale"], trained=not zero_shot)
    else:
        classes, width = state["weight"].shape
        classifier = nn.Linear(width, classes, bias="bias" in state)
    classifier.load_state_dict(state)
    return classifier

# --- Files: plug-ins, whole networks, states of --resume ------------------------------------------

def read_tensors(path):
    """torch.load of tensors and plain data, so that no code in the file runs; raises Refusal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles, which fail below
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except FileNotFoundError as error:
        way_out = ""
        if str(path).endswith(".pt"):
            way_out = (f"; robustify.py makes a teacher with --make-teacher NAME --out {path}, "
                       f"a plug-in with --student NAME --out {path}")
        raise Refusal(f"{path}: no such file{way_out}") from error
    except Exception as error:  # a broken file may raise anything
        raise Refusal(f"{path}: not a readable checkpoint (truncated, of another format, or with "
                      "code in it); make or download it again, or save its state_dict() "
                      "alone") from error

def read_checkpoint(path, kind):
    """The content of a file of robustify.py; kind: "plug-in", "network", "state" or "any" of them.
    Raises Refusal, also where a bit of it was changed."""
    content = read_tensors(path)
    found = str(content.get("format")) if isinstance(content, dict) else ""
    ours = found.startswith("robustify ")
    if not ours or (kind != "any" and found != f"robustify {kind}"):
        raise Refusal(f"{path}: not a {kind} that robustify.py wrote")
    with refusing_damage(path):
        if content.pop("sha256", "") != digest(content):
            raise ValueError("its checksum is another")
    return content

def digest(content):
    """sha256, in hex, of nested dicts, lists, tensors and plain values."""
    total = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            value = list(value.items())
        if isinstance(value, (list, tuple)):
            total.update(f"[{len(value)}]".encode())
            for part in value:
                add(part)
        elif isinstance(value, torch.Tensor):
            total.update(f"{tuple(value.shape)}{value.dtype}".encode())
            total.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            total.update(f"{value!r};".encode())

    add(content)
    return total.hexdigest()

def fingerprint(*modules):
    """sha256, in hex, of the modules' tensors and their names."""
    return digest([module.state_dict() for module in modules])

def read_state_dict(path):
    """A plain state dict, as people publish it; raises Refusal."""
    content = read_tensors(path)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    if not isinstance(content, dict):
        raise Refusal(f"{path}: holds no state dict")
    return {str(name).removeprefix("module."): value for name, value in content.items()}

def can_be_written(path):
    """Whether `path` is or may become a file: its folder is there and takes files."""
    path = Path(path).absolute()
    takes_files = path.parent.is_dir() and os.access(path.parent, os.W_OK)
    return takes_files and (path.is_file() or not path.exists())

def replace_file(path, content):
    """Write bytes atomically: a crash or a full disk leaves the older file whole."""
    temporary = Path(f"{path}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            os.fsync(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def write_checkpoint(kind, content, path):
    """What read_checkpoint reads; raises Refusal where it cannot be written."""
    content = {"format": f"robustify {kind}", **content}
    buffer = io.BytesIO()
    torch.save({**content, "sha256": digest(content)}, buffer)
    try:
        replace_file(path, buffer.getbuffer())
    except OSError as error:
        raise Refusal(f"{path}: cannot be written ({error.strerror}); the older file stays; make "
                      "room and use --resume") from error

@contextlib.contextmanager
def refusing_damage(path):
    """Within, all that the content of a mutated checkpoint can cause is one Refusal."""
    try:
        yield
    except DAMAGE as error:
        raise Refusal(f"{path}: damaged, or of another version of robustify.py: "
                      f"{str(error)[:200]}") from error

FROZEN = ("backbone.", "original.")  # what a plug-in does not hold

def tuned_state(student):
    """The tensors that a plug-in holds: all that are not FROZEN."""
    state = student.state_dict()
    return {name: value for name, value in state.items() if not name.startswith(FROZEN)}

def load_tuned(student, tuned):
    """Sets exactly the tensors of tuned_state; raises KeyError, naming one that is missing or does
    not belong there."""
    different = tuned.keys() ^ tuned_state(student).keys()
    if different:
        raise KeyError(min(different))
    student.load_state_dict(tuned, strict=False)

def save(student, path):
    """The plug-in: tuned part, config, class names, where M comes from and its fingerprint."""
    classifier = None
    if student.source:
        classifier = student.original[1][-1].state_dict()
    write_checkpoint("plug-in", {
        "tuned": tuned_state(student), "config": asdict(student.config), "source": student.source,
        "class_names": student.class_names, "classifier": classifier,
        "fingerprint": fingerprint(student.backbone, student.original)}, path)

def load(path, backbone=None, shared=None, head=None, class_names=None, alpha=1.0):
    """robust.pt -> RobustStudent in eval mode: pixels in, class probabilities out.

    backbone, shared, head: your own modules, where it was tuned on such. class_names: new classes
    for a student of --zero-shot. alpha: interpolation with the original (WiSE-FT). Raises Refusal
    where the file is no whole plug-in or was tuned on other weights.
    """
    saved = read_checkpoint(path, "plug-in")
    with refusing_damage(path):
        config = Config(**saved["config"])
        given = [module for module in (backbone, shared, head) if module is not None]
        if not given:
            student = assemble(original_network(path, saved), config)
        elif len(given) == 3:
            student = RobustStudent(backbone, shared, head, config)
        else:
            raise Refusal(f"{path}: give backbone, shared and head together, or none of them")
        found = fingerprint(student.backbone, student.original)
        if found != saved["fingerprint"]:
            name = student.source["name"] if student.source else "this one"
            raise Refusal(f"{path}: tuned on a network with fingerprint "
                          f"{saved['fingerprint'][:16]}, {name} has {found[:16]}; load the "
                          "weights that it was tuned on")
        load_tuned(student, saved["tuned"])
        student.class_names = saved["class_names"]
    if class_names is not None:
        if student.text_embeddings is None:
            raise Refusal(f"{path}: has no text encoder for new class names")
        set_classes(student, class_names, *student.text_embeddings(class_names))
    return student if alpha == 1 else interpolated(student, alpha)

def interpolated(student, alpha):
    """WiSE-FT [33]: a student of weights (1 - alpha) * original + alpha * tuned, in every head. It
    shares its frozen parts with `student`."""
    shared, head = student.original
    mixed = RobustStudent(student.backbone, shared, head, student.config)
    mixed.to(student.masks.device)
    mixed.original = student.original
    copy_description(student, mixed)
    tuned = tuned_state(student)
    with torch.no_grad():
        for name, value in tuned_state(mixed).items():
            if value.is_floating_point():
                value.lerp_(tuned[name], alpha)
    return mixed.eval()

def beside(path, name):
    """`name`, which may be or end with a file. Where that is not in its place, one of its name
    beside the plug-in at `path` serves: both may have been moved."""
    family, colon, file = name.rpartition(":")
    candidate = Path(path).parent / Path(file).name
    if Path(file).suffix and candidate.is_file() and not Path(file).is_file():
        return f"{family}{colon}{candidate}"
    return name

def load_original(path):
    """The whole Network M that the plug-in at `path` was tuned from; raises Refusal."""
    return original_network(path, read_checkpoint(path, "plug-in"))

def original_network(path, saved):
    """As load_original, of the content of the file; load compares fingerprints."""
    with refusing_damage(path):
        source = saved["source"]
        if not source:
            raise Refusal(f"{path}: tuned on modules of your own; give backbone, shared and head")
        moved = {key: beside(path, source[key]) for key in ("name", "pretrained") if key in source}
        try:
            network = load_network(**{**source, **moved})
        except Refusal as error:
            raise Refusal(f"{path}: needs the network that it was tuned on, where it was or beside "
                          f"it: {error}") from error
        network.classifier = classifier_from(saved["classifier"], saved["config"]["zero_shot"])
        network.class_names = saved["class_names"]
    return network

def save_network(network, path):
    """A whole Network, which read_network reads."""
    write_checkpoint("network", {
        "architecture": network.architecture, "state": network.state_dict(),
        "class_names": network.class_names}, path)

def read_network(path):
    """The Network in a .pt of --make-teacher; nothing else is read or fetched. Raises Refusal."""
    saved = read_checkpoint(path, "network")
    with refusing_damage(path):
        state = saved["state"]
        architecture = saved["architecture"]
        if re.search(r"[:/]|\.pt$", architecture["name"]):
            raise ValueError("its architecture is a file")
        network = load_network(**{**architecture, "pretrained": "none"})
        classifier = {k.removeprefix("classifier."): v for k, v in state.items()
                      if k.startswith("classifier.")}
        network.classifier = classifier_from(classifier, zero_shot=False)
        network.load_state_dict(state)
        network.class_names = saved["class_names"]
    network.text_embeddings = None  # the file holds no text tower
    network.is_random = False
    network.source = {"name": path}
    return network

FREE_TO_CHANGE = ("workers", "resume", "save_every", "data", "out", "teacher")  # when resuming

def state_file(config):
    """Where an interrupted run leaves what --resume goes on from."""
    return Path(f"{config.out}.state")

def can_resume(config):
    """Whether --resume finds a state beside config.out. Raises Refusal where there is only
    config.out: that run is over."""
    if not config.resume:
        return False
    has_state = state_file(config).is_file()
    if not has_state and Path(config.out).is_file():
        raise Refusal(f"--resume: {config.out} is finished, or of another run: there is no "
                      f"{state_file(config)}; remove {config.out} to start anew")
    return has_state

def settings_of(student, images, config):
    """What must be the same when a run goes on, and FREE_TO_CHANGE. A teacher's file may have
    moved, but not changed."""
    teacher = config.teacher
    file = Path(teacher.rpartition(":")[2])
    if file.is_file():
        teacher = hashlib.sha256(file.read_bytes()).hexdigest()
    return {**asdict(config), "processes": PROCESSES, "images": images,
            "classes": student.class_names, "content of the teacher": teacher,
            "frozen backbone": fingerprint(student.backbone)}

def write_state(student, optimizer, step, settings, config):
    """All that --resume needs after `step` steps. The probe is in it since a GPU does not repeat it
    to the bit."""
    write_checkpoint("state", {
        "settings": settings, "step": step, "tuned": tuned_state(student),
        "optimizer": optimizer.state_dict(), "original": student.original.state_dict()},
        state_file(config))

def read_state(student, optimizer, settings, config):
    """Sets student and optimizer to the state beside config.out; returns its step. Raises Refusal
    where it is of other settings or another M_b."""
    path = state_file(config)
    saved = read_checkpoint(path, "state")
    with refusing_damage(path):
        for name, value in saved["settings"].items():
            if name not in FREE_TO_CHANGE and settings[name] != value:
                raise Refusal(f"--resume: {name} was {value} and is now {settings[name]}; give the "
                              f"same settings, or remove {path}")
        student.original.load_state_dict(saved["original"])
        load_tuned(student, saved["tuned"])
        optimizer.load_state_dict(saved["optimizer"])
        return saved["step"]

# --- The demo: the whole method on drawn shapes, with no download ---------------------------------

SHAPES = ("disk", "ring", "square", "frame", "triangle", "outline", "bar", "slit")

def draw(index, rng):
    """SHAPES[index] on a grating, uint8 (64, 64, 3). A faint fine texture gives the class away: a
    shortcut that a plainly trained network takes, and that noise and blur destroy."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]

    def grating(rate, angle):
        return np.sin(rate * (x * np.cos(angle) + y * np.sin(angle)))[..., None]

    scale = rng.uniform(0.4, 0.8)
    u = (x - rng.uniform(-0.3, 0.3)) / scale
    v = (y - rng.uniform(-0.3, 0.3)) / scale
    corners = (0, 4, 3, 2)[index // 2]
    if corners == 0:
        distance = np.hypot(u, v)
    elif corners == 2:
        distance = np.maximum(abs(u) * 3, abs(v)) - 0.2
    else:
        sector = 2 * np.pi / corners
        angle = (np.arctan2(v, u) + rng.uniform(-0.3, 0.3)) % sector - sector / 2
        distance = np.hypot(u, v) * np.cos(angle)
    inside = distance < 0.7
    if index % 2:
        inside &= distance > 0.35
    image = rng.uniform(0.2, 0.8, 3) + 0.2 * grating(rng.uniform(4, 12), rng.uniform(0, np.pi))
    image[inside] = rng.uniform(0, 1, 3)
    if rng.random() < 0.7:
        image += 0.1 * grating(40, np.pi * index / 8)
    image += rng.normal(0, 0.03, image.shape)
    return (255 * image.clip(0, 1)).astype(np.uint8)

def demo(folder="demo"):
    """Draw the images, train a stand-in large student and a robust teacher, tune the student by the
    method and by its baseline APT. Raises Refusal where the folder holds other images."""
    paths = []
    for i in range(3000):
        part = "train" if i < 2400 else "val"
        paths.append(Path(folder, part, SHAPES[i % 8], f"{i:04}.png"))
    if not set(Path(folder).glob("*/*/*")) <= set(paths):
        raise Refusal(f"{folder}: holds files that are not the demo's; move it away")
    rng = np.random.default_rng(0)
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(i % 8, rng)).save(path)
    common = Config(data=folder, severity=4, batch_size=64, workers=2)
    stem = {"stem_type": "deep", "stem_width": 8}
    student = {"layers": [1, 1, 2, 6], "channels": [16, 32, 32, 32], **stem}
    teacher = {"layers": [1, 1, 1, 1], "channels": [16, 24, 32, 48], **stem}
    new = replace(common, make_teacher="resnet18", pretrained="none", image_size=64, lr=3e-3)
    train(replace(new, model_args=student, augment="none", epochs=12, out=f"{folder}/student.pt"))
    train(replace(new, model_args=teacher, epochs=7, out=f"{folder}/teacher.pt"))
    for recipe in ("three-heads", "apt"):
        train(replace(common, student=f"{folder}/student.pt", teacher=f"{folder}/teacher.pt",
                      recipe=recipe, lr=3e-3, epochs=5, out=f"{folder}/{recipe}.pt"))
    print(f"now measure what lies in {folder}/ with: python eval.py")

# --- main -----------------------------------------------------------------------------------------

def refuse(message):
    """Raises Refusal: what argparse shall do with an error."""
    raise Refusal(message)

def model_args_of(text):
    """The value of --model-args; raises Refusal."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise Refusal(f"--model-args {text}: must be JSON, such as {{\"depth\": 6}}") from error

def parse(arguments):
    """Config of the command line; raises Refusal."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse
    for field in fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            parser.add_argument(flag, action="store_true")
        elif field.type is dict:
            parser.add_argument(flag, type=model_args_of)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    config = Config(**vars(parser.parse_args(arguments)))
    out = Path(config.out)
    if out.suffix != ".pt" or not can_be_written(out):
        raise Refusal(f"--out {out}: must be a file NAME.pt in a folder that can be written")
    for name in (config.student, config.teacher, config.make_teacher, config.pretrained):
        if out.resolve() in (Path(name).resolve(), Path(name.partition(":")[2]).resolve()):
            raise Refusal(f"--out {out}: would overwrite what it is made from")
    return config

def check_settings(config):
    """Makes the values of a Config plain, so that a checkpoint can hold them; raises Refusal where
    one is outside of its limits."""
    lowest = {"epochs": 1, "batch_size": 1, "passes": 2, "severity": 1, "temperature": 0.01}
    highest = {"severity": 10, "dropout": 0.99, "block_dropout": 0.99, "fraction": 1,
               "seed": 2**63 - 1}
    for field in fields(config):
        value = getattr(config, field.name)
        flag = f"--{field.name.replace('_', '-')} {value}"
        if field.name == "model_args":
            check_model_args(value or {})
            continue
        try:
            value = type(field.default)(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise Refusal(f"{flag}: {error}") from error
        setattr(config, field.name, value)
        choices = get_args(field.type)
        if field.name == "recipe":
            choices = tuple(RECIPES)
        if choices and value not in choices:
            raise Refusal(f"{flag}: must be one of {', '.join(choices)}")
        low = lowest.get(field.name, 0)
        high = highest.get(field.name, 1e30)
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise Refusal(f"{flag}: must be from {low} to {high}")
    if not config.out:
        config.out = "teacher.pt" if config.make_teacher else "robust.pt"

def join_processes(device):
    """Under torchrun: let this process speak with the others, on its own GPU; raises Refusal."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: torch finds no GPU here")
    if PROCESSES > 1:
        try:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo",
                                                 timeout=timedelta(hours=2))
        except (LookupError, ValueError, RuntimeError) as error:
            raise Refusal(f"RANK and WORLD_SIZE are set, as by torchrun, but {error}") from error

def run(arguments):
    """Do what the command line asks for; raises Refusal and OSError."""
    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\n{inspect.getsource(Config)}")
        return
    config = parse(arguments)
    join_processes(config.device)
    if not arguments:
        demo()
    elif config.make_teacher and (config.student or config.teacher
                                  or config.recipe != Config.recipe):
        raise Refusal("--make-teacher: trains that network alone, whole; give no --student, "
                      "--teacher or --recipe")
    elif config.make_teacher or config.student:
        train(config)
    else:
        raise Refusal("give --student or --make-teacher, or no argument at all for the demo")

def main(arguments=None, run=run):
    """run(command line) -> exit code: 2, after one line on stderr, for a Refusal or OSError; 130
    for Ctrl-C. eval.py has its own `run`."""
    logging.disable(logging.ERROR)  # open_clip logs what a Refusal says
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except (Refusal, OSError) as error:
        program = Path(run.__code__.co_filename).name
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
