"""Efficiently Robustify Pre-Trained Models (Jain, Behl, Rawat, Vineet; ICCV 2023), in one file.

A large pre-trained student keeps its backbone frozen; only its last fifth is tuned. The tuned part
ends in three heads: clean, combined and unclean. On clean examples a frozen copy of the original
student teaches the clean and the combined head; on augmented examples a small robust network
teaches the unclean and the combined head. At test time MC dropout gives each head a predictive
distribution, and uncertainty times KL divergence to the combined head chooses clean or unclean.

    python robustify.py --make-teacher vit_b_16 --data imagenet/ --out vit_b16.pt
    python robustify.py --student ViT-L-14 --teacher vit_b16.pt      # writes robust.pt

    paper             here                                     shape or value
    M_b, M_s, M_h     backbone, shared, heads[...]             modules; split() says where to cut
    M (original)      backbone, then original                  frozen
    M_t               teacher                                  a whole small Network, frozen
    c, m, u           "clean", "combined", "unclean"           HEADS
    x, y              pixels, labels                           (B, 3, H, W) in [0, 1], (B,)
    D^a, beta         Views, is_clean                          beta = 1 where is_clean (B,)
    L_c, L_d          cross_entropy, distillation              Eqs. 3-5: generalized_distillation
    phi, U_mc         phi, uncertainty                         (B, C), (B,); mc_dropout, K passes
    h_f               select_head                              Eq. 6, (B,) index into HEADS
"""

import argparse
import copy
import hashlib
import inspect
import io
import json
import logging
import os
import pickle
import re
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

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

HEADS = ("clean", "combined", "unclean")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


class Refusal(Exception):
    """Something the user can mend; `main` prints it as one line and exits with code 2."""


@dataclass
class Config:
    """Every setting, one flag each. The defaults are the recipe; "ours": the paper is silent."""
    student: str = ""  # network to robustify: open_clip, timm, torchvision NAME, NAME:FILE, or .pt
    teacher: str = ""  # Sec. 4.2: small robust network, named likewise
    make_teacher: str = ""  # Sec. 4.2: train this network whole on D^a instead, and save it
    data: str = "imagenet"  # folder with train/ and val/ of class folders, or such a class folder
    out: str = ""  # file to write; default robust.pt, or teacher.pt with --make-teacher
    pretrained: str = ""  # TAG, FILE or none; default: openai for open_clip, else the library's own
    image_size: int = 0  # input size in pixels; 0: the network's own
    model_args: str = "{}"  # JSON, keyword arguments for the network's constructor
    fraction: float = 0.20  # Table 5: tuned share of the image tower, counted with one head
    head_blocks: int = 1  # Sec. 4.1: last blocks that belong to each head (number ours)
    zero_shot: bool = False  # Sec. 4.4: the text embeddings stay the classifier
    recipe: str = "ours"  # a row of RECIPES: ours, or a baseline of Sec. 5
    augment: str = "augmix+deepaugment"  # Sec. 4.2, D^a: augmix, augmix+deepaugment or none
    extra_data: tuple = ()  # more folders of augmented images, such as DeepAugment's
    severity: int = 2  # AugMix on torchvision's scale: 2 = published 1 (ImageNet), 4 = 3 (CIFAR)
    jsd: float = 12.0  # AugMix: weight of Jensen-Shannon in --make-teacher; 0: plain cross-entropy
    temperature: float = 2.0  # ours: T of the distillation loss
    distill_weight: float = 1.0  # ours: weight of L_d beside L_c
    dropout: float = 0.1  # Sec. 4.3.2: rate before each classifier (rate ours)
    block_dropout: float = 0.05  # Sec. 4.3.2: rate on the branch of each tuned block (rate ours)
    passes: int = 10  # Sec. 4.3.2: MC dropout passes K (number ours)
    rule: str = "kl-u"  # Eq. 6; ablations: u, kl, confidence
    mc: str = "head"  # the K passes run through the classifier; ablation: tuned, all tuned blocks
    tune_batch_norm: bool = False  # ablation: update batch-norm statistics of the tuned part
    optimizer: str = "adamw"  # ours: adamw, or sgd with momentum 0.9
    lr: float = 1e-4  # ours: peak learning rate, after warm-up, before cosine decay
    weight_decay: float = 1e-4  # ours
    warmup: float = 0.05  # ours: share of all steps for linear warm-up
    clip: float = 1.0  # ours: limit of the gradient's norm, since T^2 scales gradients
    epochs: int = 10  # ours
    batch_size: int = 256  # ours: images a step, over all processes
    limit: int = 0  # use so many training images, drawn by the seed; 0: all
    seed: int = 0  # of weights, order, views and dropout masks
    workers: int = min(8, os.cpu_count() or 1)  # data loading processes, for each process
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda or cpu


# --- The student: M = M_h . M_s . M_b with three heads (Sec. 4.1, Fig. 4) -------------------------


class BranchDropout(nn.Module):
    """Dropout on what a block adds to its input; a block that changes the shape gets none.

    On the whole residual stream even p = 0.1 is noise of a third of the signal (Sec. 4.3.2).
    """

    def __init__(self, block, p):
        super().__init__()
        self.block, self.dropout = block, nn.Dropout(p)

    def forward(self, x):
        y = self.block(x)
        return x + self.dropout(y - x) if self.dropout.training and y.shape == x.shape else y


class CosineClassifier(nn.Module):
    """scale * normalize(f) . normalize(W), (..., D) -> (..., C): Sec. 4.4's dot product.

    W (C, D) starts as text embeddings; a parameter where `trained` (VE), else a buffer (ZS).
    """

    def __init__(self, weight, scale, trained):
        super().__init__()
        if trained:
            self.weight = nn.Parameter(weight.clone())
        else:
            self.register_buffer("weight", weight.clone())
        self.register_buffer("scale", torch.as_tensor(float(scale)))

    def forward(self, features):
        return self.scale * F.normalize(features, dim=-1) @ F.normalize(self.weight, dim=-1).T


def layers(module):
    """The children of an nn.Sequential, or the module itself, as a list."""
    return list(module) if isinstance(module, nn.Sequential) else [module]


class Head(nn.Module):
    """M_h: last blocks, pooling, norm, projection; then dropout and the classifier. h -> (B, C)."""

    def __init__(self, head, config):
        super().__init__()
        *body, self.classifier = layers(copy.deepcopy(head))
        self.body = nn.Sequential(*(BranchDropout(block, config.block_dropout) for block in body))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h):
        return self.classifier(self.dropout(self.body(h)))


class Prediction(NamedTuple):
    """What `predict` returns; head and uncertainty are None where there are no heads."""
    probabilities: torch.Tensor  # (B, C), phi of the chosen head
    head: torch.Tensor           # (B,), index into HEADS
    uncertainty: torch.Tensor    # (B,), U_mc of the chosen head, a standard deviation
    everyone: dict               # {name: (B, C)}: each head's phi, "selected", maybe "original"


class RobustStudent(nn.Module):
    """The student of Fig. 4.

    backbone: pixels -> activations z. shared: z -> h, a Sequential of blocks. head: h -> logits
    (B, C), a Sequential that ends in the classifier (with `.weight` (C, D)), and before it in one
    vector (B, D); a bare classifier makes linear heads. The backbone is frozen in place, shared and
    head are copied: three heads or the recipe's, and `original`, the teacher of clean examples.
    """

    def __init__(self, backbone, shared, head, config=None):
        super().__init__()
        self.config, self.origin = config or Config(), {}
        self.backbone = backbone.requires_grad_(False)
        self.original = copy.deepcopy(nn.Sequential(shared, head)).requires_grad_(False)
        self.shared = nn.Sequential(*(BranchDropout(block, self.config.block_dropout)
                                      for block in layers(copy.deepcopy(shared))))
        self.heads = nn.ModuleDict({name: Head(head, self.config)
                                    for name in RECIPES[self.config.recipe].heads})
        self.shared.requires_grad_(True)
        self.heads.requires_grad_(True)
        # Drawn once and shared by all images, so that a prediction depends on its image alone.
        generator = torch.Generator().manual_seed(self.config.seed)
        features, keep = layers(head)[-1].weight.shape[1], 1 - self.config.dropout
        draws = torch.rand(self.config.passes, features, generator=generator)
        self.register_buffer("masks", (draws < keep) / keep)                # (K, D)
        self.eval()

    def train(self, mode=True):
        """Training mode reaches the tuned part alone, and not its batch-norm statistics."""
        super().train(mode)
        self.backbone.eval()
        self.original.eval()
        for module in [] if self.config.tune_batch_norm else self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @torch.no_grad()
    def predict(self, pixels, with_original=False):
        """pixels (B, 3, H, W) in [0, 1] -> Prediction. Nothing is random: the masks are fixed."""
        z = self.backbone(pixels)                                           # M_b, once
        if self.config.mc == "tuned":
            spread = self.mc_dropout_tuned(z)
        else:
            h = self.shared(z)                                              # M_s, once
            spread = {name: mc_dropout(head.classifier, head.body(h), self.masks)
                      for name, head in self.heads.items()}                 # K passes a head
        phi, uncertainty = ({name: s[i] for name, s in spread.items()} for i in (0, 1))
        if len(phi) == 1:                                                   # a baseline: no choice
            chosen = torch.full(pixels.shape[:1], HEADS.index("combined"), device=z.device)
        else:
            chosen = select_head(phi, uncertainty, self.config.rule)        # Eq. 6
        pick = lambda of: torch.stack([of.get(name, of["combined"]) for name in HEADS])[
            chosen, torch.arange(len(chosen), device=z.device)]
        everyone = {"original": self.original(z).float().softmax(-1)} if with_original else {}
        return Prediction(pick(phi), chosen, pick(uncertainty),
                          {**everyone, **phi, "selected": pick(phi)})

    def mc_dropout_tuned(self, z):
        """Ablation: K passes with dropout alive in all tuned blocks, {head: (phi, U)}."""
        dropouts = [m for m in self.modules() if isinstance(m, nn.Dropout)]
        with torch.random.fork_rng(devices=[z.device] if z.is_cuda else []):
            torch.manual_seed(self.config.seed)
            for dropout in dropouts:
                dropout.train()
            passes = [[head(h) for head in self.heads.values()]
                      for h in (self.shared(z) for _ in self.masks)]
        self.eval()
        return {name: spread_of(torch.stack(p, 1)) for name, p in zip(self.heads, zip(*passes))}

    def forward(self, pixels):
        """pixels (B, 3, H, W) in [0, 1] -> class probabilities (B, C)."""
        return self.predict(pixels).probabilities


# --- The loss (Sec. 4.3.1, Eqs. 3-5) --------------------------------------------------------------


def examples_of(is_clean):
    """Which rows each head learns from: is_clean (B,) bool, beta of Eq. 5 -> {head: (B,) bool}."""
    return {"clean": is_clean, "combined": torch.ones_like(is_clean), "unclean": ~is_clean}


def distillation(logits, teacher_logits, temperature):
    """L_d [15], (B, C) each: T^2 * KL(teacher_T || student_T), summed over rows, in float32."""
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True)


def generalized_distillation(logits, teacher_logits, labels, is_clean, temperature, weight):
    """Eqs. 3-5: the mean over the batch of beta * L_clean + (1 - beta) * L_aug.

    logits: {head: (n, C)} for the n rows that `examples_of` gives that head. teacher_logits (B, C):
    the original's where is_clean, the robust teacher's elsewhere; None without distillation.
    """
    total = 0.0
    for head, own_logits in logits.items():
        rows = examples_of(is_clean)[head]
        total = total + F.cross_entropy(own_logits.float(), labels[rows], reduction="sum")  # L_c
        if teacher_logits is not None:
            total = total + weight * distillation(own_logits, teacher_logits[rows], temperature)
    return total / len(labels)


# --- Head selection (Sec. 4.3.2, Eq. 6) -----------------------------------------------------------


def spread_of(logits):
    """K passes (B, K, C) -> phi (B, C), the mean of their softmax, and U_mc (B,), its std.

    The std over passes is averaged over classes.
    """
    p = logits.float().softmax(-1)
    return p.mean(1), p.std(1, correction=0).mean(-1)


def mc_dropout(classifier, features, masks):
    """MC dropout in one broadcast: features (B, D) under masks (K, D) -> phi (B, C), U_mc (B,)."""
    return spread_of(classifier(features[:, None] * masks))


def kl_divergence(p, q):
    """KL(p || q) of probabilities (B, C) -> (B,), in nats; finite where one underflowed."""
    tiny = torch.finfo(p.dtype).tiny
    return (p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum(-1)


def select_head(phi, uncertainty, rule="kl-u"):
    """Eq. 6: argmin over k in {c, u} of U_k * KL(phi_m || phi_k); a tie goes to the clean head.

    phi {head: (B, C)}, uncertainty {head: (B,)} -> (B,) index into HEADS. The other rules are the
    ablation of Sec. 5.3: either factor alone, or the largest probability.
    """
    score = {"kl-u": lambda k: uncertainty[k] * kl_divergence(phi["combined"], phi[k]),
             "u": lambda k: uncertainty[k],
             "kl": lambda k: kl_divergence(phi["combined"], phi[k]),
             "confidence": lambda k: -phi[k].amax(-1)}[rule]
    clean = score("clean") <= score("unclean")
    return torch.where(clean, HEADS.index("clean"), HEADS.index("unclean"))


# --- Recipes: ours, and the paper's baselines (Sec. 5) --------------------------------------------


class Recipe(NamedTuple):
    """Which heads are tuned, and whether the two teachers speak (else: labels alone)."""
    heads: tuple
    distil: bool


RECIPES = {"ours": Recipe(HEADS, True),
           "apt": Recipe(("combined",), False)}  # augmentation based partial fine-tuning


class StudentObjective(nn.Module):
    """Fig. 4 in training: pixels (B, 3, H, W), labels (B,), is_clean (B,) -> Eq. 5, a scalar."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher and teacher.eval().requires_grad_(False)

    def forward(self, pixels, labels, is_clean):
        student, config, targets = self.student, self.student.config, None
        with torch.no_grad():
            z = student.backbone(pixels)                                    # M_b, once for both
            if RECIPES[config.recipe].distil:
                targets = torch.zeros(len(labels), layers(student.original[1])[-1].weight.shape[0],
                                      device=pixels.device)
                if is_clean.any():
                    targets[is_clean] = student.original(z[is_clean]).float()
                if not is_clean.all():
                    targets[~is_clean] = self.teacher(pixels[~is_clean]).float()     # M_t
        h = student.shared(z)                                               # M_s
        rows = examples_of(is_clean)
        logits = {name: head(h[rows[name]])                                 # M_h, on its own kind
                  for name, head in student.heads.items() if rows[name].any()}
        return generalized_distillation(logits, targets, labels, is_clean, config.temperature,
                                        config.distill_weight)


# --- Data: D^a, clean and augmented views (Secs. 4.2, 4.3) ----------------------------------------


def image_folder(folder, flag="--data"):
    """([(path, label)], class names) of a folder of class folders; raises Refusal, naming it."""
    try:
        found = torchvision.datasets.ImageFolder(folder)
    except OSError as error:
        raise Refusal(f"{flag} {folder}: {str(error).splitlines()[0].split(' Supported')[0]}"
                      " Expected CLASS/IMAGE files, or train/ and val/ that hold them.") from error
    return found.samples, found.classes


def noise2net(image):
    """DeepAugment's weight-free form [10]: a random Res2Net distorts one image (3, H, W) in [0, 1].

    y + eps * f(y), four times, on normalised pixels; the weights come from torch's generator.
    """
    def convolve(x, channels, kernel=1, dilation=1):
        bound = (x.shape[1] * kernel**2) ** -0.5
        weight = torch.empty(channels, x.shape[1], kernel, kernel).uniform_(-bound, bound)
        return F.conv2d(x, weight, padding=kernel // 2 * dilation, dilation=dilation)

    mean, std = (torch.tensor(s)[:, None, None] for s in (IMAGENET_MEAN, IMAGENET_STD))
    y = ((image - mean) / std)[None]
    for _ in range(4):
        groups = F.relu(F.instance_norm(convolve(y, 16))).chunk(4, dim=1)
        outputs = [groups[0]]
        for group in groups[1:]:
            kernel, dilation = (1, 1) if torch.rand(()) < 0.5 else (3, int(torch.randint(1, 4, ())))
            f = convolve(group + outputs[-1], 4, kernel, dilation)
            outputs.append(F.relu(F.instance_norm(f)))
        y = y + torch.empty(()).uniform_(0.375, 0.75) * convolve(torch.cat(outputs, dim=1), 3)
    return (y[0] * std + mean).clamp(0, 1)


class Views(Dataset):
    """Views of images, each a function of (seed, epoch, index) alone: any workers, ranks, resumes.

    An item is (pixels uint8, label, is_clean, unreadable). `kind` says what pixels hold:
    "coin": (3, H, W), clean or augmented by a fair coin: D^a as the student sees it;
    "triple": (3, 3, H, W), the clean view and two augmented ones, for AugMix's Jensen-Shannon loss;
    "clean": (3, H, W), randomly cropped; "centre": (3, H, W), not random, for validation.
    The next readable image replaces an unreadable one, whose index is `unreadable`, else -1.
    Samples from `own` on are augmented already (--extra-data), never clean.
    """

    def __init__(self, samples, size, kind, config, own=None):
        self.samples, self.kind, self.config, self.epoch = samples, kind, config, 0
        self.own = len(samples) if own is None else own
        small = size <= 64
        self.centre = v2.Compose([v2.Resize(size if small else size * 256 // 224),
                                  v2.CenterCrop(size)])
        crop = [v2.Resize(size), v2.RandomCrop(size, padding=size // 8)] if small \
            else [v2.RandomResizedCrop(size)]
        self.crop = v2.Compose([*crop, v2.RandomHorizontalFlip()])
        # all_ops would add operations that overlap ImageNet-C's corruptions: leakage.
        self.augmix = v2.AugMix(severity=config.severity, all_ops=False)

    def __len__(self):
        return len(self.samples)

    def read(self, index):
        """(image uint8 (3, H, W), label, unreadable)"""
        for step in range(len(self)):
            path, label = self.samples[(index + step) % len(self)]
            try:
                with Image.open(path) as image:
                    return v2.functional.pil_to_tensor(image.convert("RGB")), label, \
                        index if step else -1
            except (OSError, SyntaxError, ValueError):  # what Pillow raises for broken files
                continue
        raise Refusal(f"{path}: none of the images can be read")

    def augmented(self, view):
        """Noise2Net on every second view, where asked for; then AugMix. (3, H, W) uint8."""
        if "deepaugment" in self.config.augment and torch.rand(()) < 0.5:
            view = (noise2net(view / 255) * 255).byte()
        return self.augmix(view)

    def __getitem__(self, index):
        image, label, unreadable = self.read(index)
        state = np.random.SeedSequence((self.config.seed, self.epoch, index)).generate_state(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(state[0]))
            is_clean = bool(torch.rand(()) < 0.5) and index < self.own                  # beta
            view = self.centre(image) if self.kind == "centre" else self.crop(image)
            if self.kind == "triple":
                view = torch.stack([view, self.augmented(view), self.augmented(view)])
            elif self.kind == "coin" and not is_clean:
                view = self.augmented(view)
        return view, label, is_clean, unreadable


def loader(views, config, epoch=None):
    """Batches of this process: shuffled by (seed, epoch), or all in order where epoch is None."""
    order, batch = np.arange(len(views)), max(1, config.batch_size // PROCESSES)
    if epoch is not None:
        views.epoch = epoch
        order = np.random.default_rng((config.seed, epoch)).permutation(order)
        whole = max(1, len(order) // (batch * PROCESSES)) * batch
        order = order[RANK::PROCESSES][:whole]
    return DataLoader(views, batch, sampler=order.tolist(), num_workers=config.workers)


# --- Networks: loading, splitting, saving ---------------------------------------------------------


class Part(nn.Module):
    """A shallow copy of `net` with only the children and tensors in `keep`, run as `run(net, x)`."""

    def __init__(self, net, keep, run):
        super().__init__()
        self.net, self.run = copy.copy(net), run
        for kind in ("_modules", "_parameters", "_buffers"):
            self.net.__dict__[kind] = {k: v for k, v in getattr(net, kind).items() if k in keep}

    def forward(self, x):
        return self.run(self.net, x)


def sections(net):
    """(stem, blocks, pool, classifier or None) of a library's network; raises Refusal (Sec. 4.1).

    `pool` takes the last block's activations to one vector (B, D): pooling, norm, projection. A ViT
    pools before its final norm, which is equal to the bit and leaves a single token to normalise.
    """
    kind = f"{type(net).__module__.split('.')[0]} {type(net).__name__}"
    children = {*net._modules, *net._parameters}
    if kind == "open_clip VisionTransformer" and net.attn_pool is None and net.pool_type == "tok":
        return (Part(net, children - {"transformer", "ln_post", "proj"}, lambda n, x: n._embeds(x)),
                net.transformer.resblocks,
                Part(net, {"ln_post", "proj"}, lambda n, x: n.ln_post(x[:, 0]) @ n.proj), None)
    if kind == "timm VisionTransformer":
        last = {"norm", "fc_norm", "attn_pool"}
        run = (lambda n, x: n.fc_norm(n.norm(x[:, 0]))) if net.global_pool == "token" \
            else (lambda n, x: n.fc_norm(n.pool(n.norm(x))))
        return (Part(net, children - last - {"blocks", "head_drop", "head"},
                     lambda n, x: n.norm_pre(n.patch_drop(n._pos_embed(n.patch_embed(x))))),
                net.blocks, Part(net, last, run), net.head)
    if kind == "torchvision VisionTransformer":
        return (nn.Sequential(
            Part(net, {"conv_proj", "class_token"}, lambda n, x: torch.cat(
                [n.class_token.expand(len(x), -1, -1), n._process_input(x)], dim=1)),
            Part(net.encoder, {"pos_embedding", "dropout"},
                 lambda n, x: n.dropout(x + n.pos_embedding))), net.encoder.layers,
            nn.Sequential(Part(net.encoder, {"ln"}, lambda n, x: n.ln(x[:, 0])), *net.heads[:-1]),
            net.heads[-1])
    if kind == "timm ConvNeXt":
        blocks = [b if i else nn.Sequential(stage.downsample, b)
                  for stage in net.stages for i, b in enumerate(stage.blocks)]
        return (net.stem, blocks, nn.Sequential(net.norm_pre, Part(
            net.head, {"global_pool", "norm", "flatten", "pre_logits"},
            lambda n, x: n.pre_logits(n.flatten(n.norm(n.global_pool(x)))))), net.head.fc)
    if kind.endswith("ResNet"):
        blocks = [block for i in "1234" for block in getattr(net, f"layer{i}")]
        stem = children - {"layer1", "layer2", "layer3", "layer4", "attnpool", "fc"}
        if kind == "open_clip ModifiedResNet":
            return Part(net, stem, lambda n, x: n.stem(x)), blocks, net.attnpool, None
        if kind == "timm ResNet":
            return (Part(net, stem - {"global_pool"}, lambda n, x: n.maxpool(n.act1(n.bn1(
                n.conv1(x))))), blocks, net.global_pool, net.fc)
        return (Part(net, stem - {"avgpool"}, lambda n, x: n.maxpool(n.relu(n.bn1(n.conv1(x))))),
                blocks, nn.Sequential(net.avgpool, nn.Flatten(1)), net.fc)
    raise Refusal(f"cannot split a {kind}: not an open_clip ViT or ResNet, a timm ViT, ResNet or "
                  "ConvNeXt, nor a torchvision ViT or ResNet; give RobustStudent your own modules")


class Preprocess(nn.Module):
    """Pixels in [0, 1] of any size -> the network's own size and normalisation."""

    def __init__(self, size, mean, std):
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x):
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return (x - self.mean) / self.std


class Network(nn.Module):
    """A whole network M as stem, blocks, pool, classifier: pixels (B, 3, H, W) -> logits (B, C).

    `size` is its input size in pixels; `source`, load_network's arguments, rebuilds it;
    `text_embeddings(names)` gives ((C, D), scale) for CLIP, else it is None; so is an unknown
    `class_names`.
    """

    def __init__(self, net, size, mean, std, text_embeddings, source):
        super().__init__()
        stem, blocks, self.pool, classifier = sections(net)
        self.classifier = classifier if isinstance(classifier, nn.Linear) else None
        self.stem = nn.Sequential(Preprocess(size, mean, std), stem)
        self.blocks = nn.Sequential(*blocks)
        self.size, self.text_embeddings, self.source = size, text_embeddings, source
        self.class_names = None

    def features(self, x):
        """pixels (B, 3, H, W) in [0, 1] -> (B, D), what the classifier sees."""
        return self.pool(self.blocks(self.stem(x)))

    def forward(self, x):
        return self.classifier(self.features(x))

    @torch.no_grad()
    def predict(self, pixels, with_original=False):
        """pixels (B, 3, H, W) in [0, 1] -> Prediction with one predictor, "model"."""
        p = self(pixels).float().softmax(-1)
        return Prediction(p, None, None, {"model": p})


def count(*modules):
    """Number of parameters."""
    return sum(p.numel() for m in modules for p in m.parameters())


def split(network, fraction, head_blocks):
    """(K, N): M_b = blocks[:K], M_s = blocks[K:N], M_h = blocks[N:], pool, classifier (Sec. 4.1).

    K brings the parameters of M_s and one M_h as close to `fraction` of all as blocks allow.
    """
    n = max(0, len(network.blocks) - head_blocks)
    rest, target = count(network.pool, network.classifier), fraction * count(network)
    return min(range(n + 1), key=lambda k: abs(count(network.blocks[k:]) + rest - target)), n


def assemble(network, at, config):
    """RobustStudent of a Network cut at (K, N)."""
    blocks, (k, n) = list(network.blocks), at
    student = RobustStudent(nn.Sequential(network.stem, *blocks[:k]), nn.Sequential(*blocks[k:n]),
                            nn.Sequential(*blocks[n:], network.pool, network.classifier), config)
    student.origin = {"source": network.source, "split": at, "class_names": network.class_names,
                      "classifier": network.classifier.state_dict()}
    student.size, student.class_names = network.size, network.class_names
    return student


def load_network(name, pretrained="", image_size=0, model_args=None, seed=0):
    """A Network by open_clip, timm or torchvision name, NAME:FILE, or a .pt of --make-teacher.

    Random weights (`none`) come from `seed`. Raises Refusal, and OSError where it cannot download.
    """
    if name.endswith(".pt") and ":" not in name:
        saved = read_tensors(name, "network")
        network = load_network(**saved["source"])
        network.classifier = classifier_from(saved["state"], "classifier.")
        network.load_state_dict(saved["state"])
        network.class_names, network.source = saved["class_names"], {"name": name}
        return network
    source = dict(name=name, pretrained=pretrained, image_size=image_size, model_args=model_args,
                  seed=seed)
    name, _, file = name.partition(":")
    file = pretrained if Path(pretrained).is_file() else file
    tag = None if file or pretrained == "none" else pretrained
    build = (build_timm if timm.is_model(name)  # first: open_clip has a convnext_tiny too
             else build_clip if name in open_clip.list_models()
             else build_torchvision if name in torchvision.models.list_models() else None)
    if not build:
        raise Refusal(f"{name}: not an open_clip, timm or torchvision name, nor a .pt file")
    torch.manual_seed(seed)
    try:
        whole, net, size, mean, std, embed = build(name, tag, image_size, model_args or {})
        if size <= 64 and hasattr(net, "maxpool"):  # a strided 7x7 stem is wrong here: 3x3, no pool
            first, *rest = layers(net.conv1)
            small = nn.Conv2d(3, first.out_channels, 3, padding=1, bias=False)
            net.conv1, net.maxpool = nn.Sequential(small, *rest) if rest else small, nn.Identity()
        if file:
            state = read_tensors(file)
            state = state.get("state_dict", state.get("model", state))
            whole.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    except (RuntimeError, TypeError) as error:  # an unknown tag or argument; weights do not fit
        raise Refusal(f"{source['name']}: {' '.join(str(error).split())[:300]}") from error
    return Network(net, size, mean, std, embed, source)


def build_clip(name, tag, image_size, args):
    """(whole, image tower, size, mean, std, text_embeddings). OpenAI's weights need QuickGELU."""
    tag = "openai" if tag == "" else tag
    known = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    logging.disable(logging.WARNING)  # about random weights, and what force_quick_gelu mends
    clip = open_clip.create_model(name, pretrained=tag, force_image_size=image_size or None,
                                  force_quick_gelu=known.get("quick_gelu", False), **args).eval()
    logging.disable(logging.NOTSET)
    tokenizer, net = open_clip.get_tokenizer(name), clip.visual

    def embed(names):
        """phi_text(Y) (C, D) under open_clip's 80 templates, and exp(logit_scale) (Sec. 4.4)."""
        wnids = timm.data.ImageNetInfo("imagenet-1k").label_names()
        names = [open_clip.IMAGENET_CLASSNAMES[wnids.index(n)] if n in wnids  # never by name: only
                 else n.replace("_", " ") for n in names]                     # 998 of 1000 differ
        return open_clip.build_zero_shot_classifier(
            clip, tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES).T, clip.logit_scale.exp().item()

    size = net.image_size[0] if isinstance(net.image_size, tuple) else net.image_size
    return clip, net, size, net.preprocess_cfg["mean"], net.preprocess_cfg["std"], embed


def build_timm(name, tag, image_size, args):
    """As build_clip, with the size, mean and std that the weights were trained with."""
    sized = {"img_size": image_size} if image_size and "vit" in name else {}
    net = timm.create_model(f"{name}.{tag}" if tag else name, pretrained=tag is not None,
                            **sized, **args)
    known = net.pretrained_cfg
    return net, net, image_size or known["input_size"][-1], known["mean"], known["std"], None


def build_torchvision(name, tag, image_size, args):
    """As build_clip; 224 px and ImageNet's mean and std."""
    sized = {"image_size": image_size} if image_size and "vit" in name else {}
    net = torchvision.models.get_model(name, weights="DEFAULT" if tag == "" else tag, **sized, **args)
    return net, net, image_size or 224, IMAGENET_MEAN, IMAGENET_STD, None


def classifier_from(state, prefix="", trained=True):
    """The classifier whose tensors stand under `prefix` in a state dict."""
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if "scale" in own:
        return CosineClassifier(own["weight"], own["scale"], trained)
    classifier = nn.Linear(*reversed(own["weight"].shape), bias="bias" in own)
    classifier.load_state_dict(own)
    return classifier


def read_tensors(path, kind=None):
    """Tensors and plain data of a file, by weights_only=True; `kind` is "network" or "plug-in"."""
    if not Path(path).is_file():
        how = "--student ViT-L-14 --teacher vit_b16.pt" if kind == "plug-in" else \
            "--make-teacher vit_b_16 --data imagenet/"
        raise Refusal(f"{path}: no such file; make it with: python robustify.py {how} --out {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise Refusal(f"{path}: not a readable checkpoint (truncated, of another format, or holding "
                      "code, which never runs); make or download it again") from error
    if kind and (not isinstance(content, dict) or content.get("format") != f"robustify {kind}"):
        raise Refusal(f"{path}: not a {kind} that robustify.py wrote")
    return content


def write_tensors(content, path):
    """Write atomically: a crash or a full disk leaves the older file whole. Raises OSError."""
    buffer, temporary = io.BytesIO(), Path(f"{path}.{os.getpid()}.part")
    torch.save(content, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(module):
    """sha256 over names, shapes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save(student, path):
    """The plug-in: tuned part, config, class names, where M_b comes from and its fingerprint."""
    tuned = {k: v for k, v in student.state_dict().items()
             if not k.startswith(("backbone.", "original."))}
    write_tensors({"format": "robustify plug-in", "tuned": tuned, "config": asdict(student.config),
                   "fingerprint": fingerprint(student.backbone), **student.origin}, path)


def load(path, backbone=None, shared=None, head=None, class_names=None):
    """robust.pt -> RobustStudent; with backbone, shared and head where they were your own modules.

    `class_names` gives a zero-shot student new classes. Raises Refusal where the file is no plug-in
    or was tuned on another backbone.
    """
    saved = read_tensors(path, "plug-in")
    config = Config(**saved["config"])
    if backbone is None:
        network = load_network(**saved["source"])
        network.classifier = classifier_from(saved["classifier"], trained=not config.zero_shot)
        network.class_names = saved["class_names"]
        student = assemble(network, saved["split"], config)
    else:
        student = RobustStudent(backbone, shared, head, config)
    found = fingerprint(student.backbone)
    if found != saved["fingerprint"]:
        raise Refusal(f"{path}: tuned on a backbone with fingerprint {saved['fingerprint'][:16]}, "
                      f"this one has {found[:16]}; load the weights that it was tuned on")
    student.load_state_dict(saved["tuned"], strict=False)
    if class_names:
        if not config.zero_shot:
            raise Refusal(f"{path}: only a student tuned with --zero-shot takes new class names")
        for module in student.modules():
            if isinstance(module, CosineClassifier):
                module.weight = network.text_embeddings(class_names)[0]
        student.class_names = class_names
    return student


# --- The robust teacher (Sec. 4.2) and the training loop ------------------------------------------


class TeacherObjective(nn.Module):
    """Cross-entropy of pixels (B, 3, H, W); of views (B, 3, 3, H, W) the published AugMix loss [12]:
    cross-entropy of the clean one + jsd * Jensen-Shannon divergence of the three."""

    def __init__(self, network, jsd):
        super().__init__()
        self.network, self.jsd = network, jsd

    def forward(self, pixels, labels, is_clean):
        if pixels.ndim == 4:
            return F.cross_entropy(self.network(pixels).float(), labels)
        logits = self.network(pixels.transpose(0, 1).flatten(0, 1)).float()
        views = logits.softmax(-1).unflatten(0, (3, -1))
        divergence = torch.stack([kl_divergence(p, views.mean(0)) for p in views]).mean()
        return F.cross_entropy(logits[:len(labels)], labels) + self.jsd * divergence


def accuracy(model, views, config):
    """{predictor: share of right answers, 0 to 1} of a Network or RobustStudent."""
    right = {}
    for pixels, labels, _, unreadable in loader(views, config):
        if (unreadable >= 0).any():
            raise Refusal(f"{views.samples[int(unreadable.max())][0]}: cannot be read; mend or "
                          "remove it, since skipping it in silence would change the score")
        for name, p in model.eval().predict(pixels.to(config.device) / 255, True).everyone.items():
            right[name] = right.get(name, 0) + int((p.argmax(-1).cpu() == labels).sum())
    return {name: n / len(views) for name, n in right.items()}


def fit(objective, model, views, validation, config, write):
    """Minimise `objective` over `views`; after each epoch validate `model` and `write()` it."""
    objective.to(config.device, memory_format=torch.channels_last)  # 1.5 times as fast on ResNets
    tuned = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(tuned, config.lr, 0.9, weight_decay=config.weight_decay)
    steps = config.epochs * len(loader(views, config, epoch=0))
    warmup = max(1, int(config.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (s + 1) / warmup if s < warmup
                                                 else 0.5 + 0.5 * np.cos(np.pi * s / steps))
    if PROCESSES > 1:
        objective = nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True)
    replaced = set()
    for epoch in range(config.epochs):
        model.train()
        bar = tqdm(loader(views, config, epoch), f"epoch {epoch + 1}/{config.epochs}",
                   disable=RANK > 0, mininterval=2)
        start = ready = time.perf_counter()
        seen, waited = 0, 0.0
        for step, (pixels, labels, is_clean, unreadable) in enumerate(bar):
            waited += time.perf_counter() - ready
            replaced |= set(unreadable[unreadable >= 0].tolist())
            pixels, labels, is_clean = (t.to(config.device) for t in (pixels, labels, is_clean))
            with torch.autocast("cuda", torch.bfloat16, enabled=config.device == "cuda"):
                loss = objective(pixels / 255, labels, is_clean)
            if not torch.isfinite(loss):
                raise Refusal(f"the loss became {loss.item()} in epoch {epoch + 1}, step {step + 1}; "
                              "the last checkpoint stays; try a lower --lr or --temperature")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(tuned, config.clip)
            optimizer.step()
            schedule.step()
            ready, seen = time.perf_counter(), seen + len(labels) * PROCESSES
            bar.set_postfix_str(f"loss {loss.item():.3f}, {seen / (ready - start):.0f} images/s, "
                                f"{waited / (ready - start):.0%} waiting for data", refresh=False)
        if RANK == 0:
            scores = accuracy(model, validation, config) if validation else {}
            print(f"epoch {epoch + 1} done", *(f"{k} {100 * v:.1f}" for k, v in scores.items()), sep=", ")
            write()
    if replaced and RANK == 0:
        print(f"{len(replaced)} unreadable images were replaced by the next readable one: "
              + ", ".join(str(views.samples[i][0]) for i in sorted(replaced)[:3]))


def scan(config):
    """(training samples, how many are not --extra-data, validation samples or None, classes)."""
    part = {n: Path(config.data, n) for n in ("train", "val", "test") if Path(config.data, n).is_dir()}
    samples, names = image_folder(part.get("train", config.data))
    if config.limit:
        keep = np.random.default_rng(config.seed).permutation(len(samples))[:config.limit]
        samples = [samples[i] for i in sorted(keep)]
    own, held_out = len(samples), part.get("val", part.get("test"))
    for folder in config.extra_data:
        extra, others = image_folder(folder, "--extra-data")
        same_classes(names, others, f"--extra-data {folder}")
        samples = samples + extra
    if held_out:
        folder, (held_out, others) = held_out, image_folder(held_out)
        same_classes(names, others, folder)
    return samples, own, held_out, names


def same_classes(names, others, what):
    """Raises Refusal where `others`, the classes of `what`, are not `names`; None is unknown."""
    if others is not None and list(others) != list(names):
        raise Refusal(f"{what} has {len(others)} classes ({', '.join(others[:3])} ...), the training "
                      f"data {len(names)} ({', '.join(names[:3])} ...); they must be the same")


def give_classifier(network, names, config):
    """Where the network has none for these classes: text embeddings, or a new layer. Whether it did."""
    own = network.classifier
    network.class_names = names
    if own is not None and own.weight.shape[0] == len(names) and not config.zero_shot:
        return False
    if network.text_embeddings:
        network.classifier = CosineClassifier(*network.text_embeddings(names), not config.zero_shot)
    elif config.zero_shot:
        raise Refusal(f"--zero-shot needs a network with a text encoder, {config.student} has none")
    else:
        with torch.no_grad():
            width = network.eval().features(torch.zeros(1, 3, network.size, network.size)).shape[1]
        network.classifier = nn.Linear(width, len(names))
    return True


def linear_probe(network, views, config):
    """Fit the classifier on features of centre crops, from its present weights (Sec. 5, VE)."""
    network.eval().to(config.device)
    with torch.no_grad():
        pairs = [(network.features(pixels.to(config.device) / 255), labels.to(config.device))
                 for pixels, labels, *_ in tqdm(loader(views, config), "linear probe")]
    features, labels = (torch.cat(column) for column in zip(*pairs))
    optimizer = torch.optim.AdamW(network.classifier.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(20):
        for rows in torch.randperm(len(labels), generator=generator).split(256):
            optimizer.zero_grad()
            F.cross_entropy(network.classifier(features[rows]), labels[rows]).backward()
            optimizer.step()


def prepare(name, config, kind):
    """(Network with a classifier, Views, validation Views or None) of the data that config names."""
    samples, own, held_out, names = scan(config)
    network = load_network(name, config.pretrained, config.image_size, json.loads(config.model_args),
                           config.seed)
    same_classes(names, network.class_names, name)
    new = give_classifier(network, names, config)
    if new and config.student and not config.zero_shot:
        linear_probe(network, Views(samples[:own], network.size, "centre", config), config)
    views = Views(samples, network.size, kind, config, own)
    validation = Views(held_out, network.size, "centre", config) if held_out else None
    if RANK == 0:
        print(f"network   {name}, {count(network) / 1e6:.2f} M parameters, {network.size} px\n"
              f"images    {len(views)} in {len(names)} classes, {len(held_out or [])} to validate\n"
              f"training  {config.epochs} epochs, {config.epochs * len(loader(views, config, 0))} steps "
              f"of {config.batch_size} images ({config.augment}), {config.optimizer}, lr {config.lr:g},"
              f" on {config.device}; writes {config.out}", flush=True)
    return network, views, validation


def make_teacher(config):
    """Sec. 4.2: train a small network whole on D^a, or plainly with --augment none; write it."""
    kind = "clean" if config.augment == "none" else "triple" if config.jsd else "coin"
    network, views, validation = prepare(config.make_teacher, config, kind)
    fit(TeacherObjective(network, config.jsd), network, views, validation, config,
        lambda: write_tensors({"format": "robustify network", "source": network.source,
                               "class_names": network.class_names, "config": asdict(config),
                               "state": network.state_dict()}, config.out))


def tune_student(config):
    """Sec. 4.3: cut the student, plug in the heads, tune them on D^a, write the plug-in."""
    heads, distil = RECIPES[config.recipe]
    if distil and not config.teacher:
        raise Refusal(f"--recipe {config.recipe} needs --teacher FILE.pt; see --make-teacher")
    teacher = load_network(config.teacher) if distil else None
    network, views, validation = prepare(config.student, config, "coin")
    if teacher:
        same_classes(network.class_names, teacher.class_names, config.teacher)
    k, n = at = split(network, config.fraction, config.head_blocks)
    shared = count(network.blocks[k:n])
    head = count(network.blocks[n:], network.pool, network.classifier)
    if RANK == 0:
        print(f"tuned     blocks {k + 1}-{n} shared, {n + 1}-{len(network.blocks)} a head, "
              f"{(shared + head) / count(network):.1%} ({shared / count(network) + len(heads) * head / count(network):.1%} with all heads)\n"
              f"heads     {', '.join(heads)}; teacher {config.teacher if distil else 'none'}", flush=True)
    student = assemble(network, at, config)
    fit(StudentObjective(student, teacher), student, views, validation, config,
        lambda: save(student, config.out))


# --- The demo: the whole method on drawn shapes, with no download ---------------------------------


def draw(shape, rng):
    """One of 8 shapes on a grating, uint8 (32, 32, 3). A faint fine texture gives the class away:
    a shortcut that a plainly trained network takes, and that noise and blur destroy."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    angle, size = rng.uniform(-0.4, 0.4), rng.uniform(0.45, 0.75)
    dx, dy = x - rng.uniform(-0.25, 0.25), y - rng.uniform(-0.25, 0.25)
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / size
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / size
    r, m = np.hypot(u, v), np.maximum(abs(u), abs(v))
    mask = (r < 1, (r < 1) & (r > 0.55), m < 0.85, (m < 0.9) & (m > 0.5),
            (v < 0.7) & (1.8 * abs(u) < v + 1), (m < 0.95) & (np.minimum(abs(u), abs(v)) < 0.3),
            (abs(u) < 0.3) & (abs(v) < 1.1), (r < 1) & (np.hypot(u - 0.5, v) > 0.75))[shape]
    direction, rate, phase = rng.uniform(0, np.pi), rng.uniform(4, 12), rng.uniform(0, 6)
    grating = np.sin(rate * (x * np.cos(direction) + y * np.sin(direction)) + phase)
    image = rng.uniform(0.2, 0.8, 3) + rng.uniform(-0.2, 0.2, 3) * grating[..., None]
    image[mask] = rng.uniform(0, 1, 3)
    angle = np.pi * shape / 8
    texture = np.sin(40 * (x * np.cos(angle) + y * np.sin(angle)))
    image += 0.1 * (rng.random() < 0.7) * texture[..., None] + rng.normal(0, 0.03, image.shape)
    return (255 * image.clip(0, 1)).astype(np.uint8)


SHAPES = "disk ring square frame triangle cross bar crescent".split()


def demo(folder="demo"):
    """Draw the images, train a stand-in large student and a robust teacher, run ours and APT."""
    rng = np.random.default_rng(0)
    for part, images in (("train", 4000), ("val", 1000)):
        for i in range(images):
            path = Path(folder, part, SHAPES[i % 8], f"{i:04}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(i % 8, rng)).save(path)
    config = Config(data=folder, pretrained="none", image_size=32, severity=4, batch_size=64,
                    lr=3e-3, workers=2)
    for name, augment, channels, epochs in (("student", "none", (16, 32, 64, 96), 6),
                                            ("teacher", config.augment, (8, 16, 32, 48), 6)):
        args = {"layers": [1, 1, 1, 1], "channels": channels, "stem_type": "deep", "stem_width": 8}
        make_teacher(replace(config, make_teacher="resnet18", model_args=json.dumps(args),
                             augment=augment, epochs=epochs, out=f"{folder}/{name}.pt"))
    for recipe in ("ours", "apt"):
        tune_student(replace(config, student=f"{folder}/student.pt", teacher=f"{folder}/teacher.pt",
                             recipe=recipe, epochs=4, lr=1e-3, out=f"{folder}/{recipe}.pt"))
    print("python eval.py measures what now lies in", folder)


# --- main -----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like ours."""

    def error(self, message):
        raise Refusal(message)


def parse(arguments):
    """Config from the command line; its comments are the help. Raises Refusal."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = dict(re.findall(r"    (\w+): .*?  # (.*)", inspect.getsource(Config)))
    for f in fields(Config):
        how = {bool: {"action": "store_true"}, tuple: {"nargs": "*"}}.get(f.type, {"type": f.type})
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, help=help[f.name], **how)
    config = Config(**vars(parser.parse_args(arguments)))
    for name, known in (("recipe", RECIPES), ("rule", ("kl-u", "u", "kl", "confidence")),
                        ("mc", ("head", "tuned")), ("optimizer", ("adamw", "sgd")),
                        ("augment", ("augmix", "augmix+deepaugment", "none"))):
        if getattr(config, name) not in known:
            raise Refusal(f"--{name} {getattr(config, name)}: choose from {', '.join(known)}")
    return config


def main(arguments=None):
    """The command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config = parse(arguments)
        config.out = config.out or ("teacher.pt" if config.make_teacher else "robust.pt")
        if PROCESSES > 1:
            torch.distributed.init_process_group("nccl" if config.device == "cuda" else "gloo")
            if config.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not arguments:
            demo()
        elif config.make_teacher:
            make_teacher(config)
        elif config.student:
            tune_student(config)
        else:
            raise Refusal("give --student or --make-teacher, or no argument at all for the demo")
    except (Refusal, OSError) as error:
        print(f"robustify.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
