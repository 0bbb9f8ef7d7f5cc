"""Efficiently Robustify Pre-Trained Models (Jain, Behl, Rawat, Vineet; ICCV 2023), in one file.

A large pre-trained student keeps its backbone frozen; only its last fifth is tuned. The tuned part
ends in three heads: clean, combined and unclean. On clean examples a frozen copy of the original
student teaches the clean and the combined head; on augmented examples a small robust network
teaches the unclean and the combined head. At test time MC dropout gives each head a predictive
distribution, and uncertainty times KL divergence to the combined head chooses clean or unclean.

    python robustify.py                                              # the demo, into demo/
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
    P(theta | ...)    fit                                      Eq. 2: the training loop
"""

import argparse
import copy
import hashlib
import inspect
import io
import json
import logging
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

HEADS = ("clean", "combined", "unclean")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's

class Refusal(Exception):
    """Something the user can mend; `main` prints it as one line and exits with code 2."""

@dataclass
class Config:
    """Every setting, one flag each. The defaults are the recipe; "ours": our own choice, where the
    paper is silent."""
    student: str = ""  # network to robustify: open_clip, timm, torchvision NAME, NAME:FILE, or .pt
    teacher: str = ""  # Sec. 4.2: small robust network, named likewise
    make_teacher: str = ""  # Sec. 4.2: train this network whole on D^a instead, and save it
    data: str = "imagenet"  # folder with train/ and val/ of class folders, or such a class folder
    out: str = ""  # file to write; default robust.pt, or teacher.pt with --make-teacher
    pretrained: str = ""  # TAG, FILE or none; default: openai for open_clip, else the library's own
    image_size: int = 0  # input size in pixels; 0: the network's own
    model_args: dict = None  # JSON, keyword arguments for the network's constructor
    fraction: float = 0.20  # Table 5: tuned share of the image tower, counted with one head
    head_blocks: int = 1  # Sec. 4.1: last blocks that belong to each head (number ours)
    zero_shot: bool = False  # Sec. 4.4: the text embeddings stay the classifier
    recipe: str = "ours"  # a row of RECIPES: ours, or a baseline of Sec. 5
    augment: Literal["augmix", "augmix+deepaugment", "none"] = "augmix+deepaugment"  # Sec. 4.2: D^a
    extra_data: tuple = ()  # more folders of augmented images, such as DeepAugment's
    severity: int = 2  # AugMix on torchvision's scale: 2 = published 1 (ImageNet), 4 = 3 (CIFAR)
    jsd: float = 12.0  # AugMix: weight of Jensen-Shannon in --make-teacher; 0: plain cross-entropy
    temperature: float = 2.0  # ours: T of the distillation loss
    distill_weight: float = 1.0  # ours: weight of L_d beside L_c
    dropout: float = 0.1  # Sec. 4.3.2: rate before each classifier (rate ours)
    block_dropout: float = 0.05  # Sec. 4.3.2: rate on the branch of each tuned block (rate ours)
    passes: int = 10  # Sec. 4.3.2: MC dropout passes K (number ours)
    rule: Literal["kl-u", "u", "kl", "confidence"] = "kl-u"  # Eq. 6; the others are ablations
    mc: Literal["head", "tuned"] = "head"  # K passes through the classifier; ablation: tuned blocks
    tune_batch_norm: bool = False  # ablation: update batch-norm statistics of the tuned part
    optimizer: Literal["adamw", "sgd"] = "adamw"  # ours; sgd has momentum 0.9
    lr: float = 1e-4  # ours: peak learning rate, after warm-up, before cosine decay
    weight_decay: float = 1e-4  # ours
    epochs: int = 10  # ours
    batch_size: int = 256  # ours: images a step, over all processes
    limit: int = 0  # use so many training images, drawn by the seed; 0: all
    seed: int = 0  # of weights, order, views and dropout masks
    workers: int = min(8, os.cpu_count() or 1)  # data loading processes, for each process
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run

# --- The student: M = M_h . M_s . M_b (Eq. 1) with three heads (Sec. 4.1, Fig. 4) -----------------

class BranchDropout(nn.Module):
    """Dropout on what a block adds to its input; a block that changes the shape gets none. (On the
    whole residual stream even p = 0.1 is noise of a third of the signal.)"""

    def __init__(self, block, p):
        super().__init__()
        self.block, self.dropout = block, nn.Dropout(p)

    def forward(self, x):
        y = self.block(x)
        return x + self.dropout(y - x) if self.dropout.training and y.shape == x.shape else y

class CosineClassifier(nn.Module):
    """scale * normalize(f) . normalize(W), (..., D) -> (..., C): Sec. 4.4's dot product. W (C, D)
    starts as text embeddings: a parameter in visual evaluation, a buffer in zero-shot mode."""

    def __init__(self, weight, scale, trained):
        super().__init__()
        self.weight = (nn.Parameter if trained else nn.Buffer)(weight.clone())
        self.scale = nn.Buffer(torch.as_tensor(scale))

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):  # bf16 logits of 30 err by 0.1
            features = F.normalize(features.float(), dim=-1)
            return self.scale * features @ F.normalize(self.weight, dim=-1).T

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
    """The student of Fig. 4: backbone frozen in place, shared section and heads tuned copies.
    backbone: pixels -> activations z. shared: z -> h, a Sequential of blocks. head: h -> logits
    (B, C), a Sequential of blocks, pooling to one vector (B, D) and the classifier, with `.weight`
    (C, D); a bare classifier makes linear heads. `original` keeps M, the teacher of clean examples.
    Each child of shared and head counts as a block: BranchDropout acts on what it adds.
    """

    def __init__(self, backbone, shared, head, config=None):
        super().__init__()
        self.config = config = config or Config()
        self.backbone, self.origin = backbone.requires_grad_(False), {}
        self.original = copy.deepcopy(nn.Sequential(shared, head)).requires_grad_(False)
        blocks = (BranchDropout(b, config.block_dropout) for b in layers(copy.deepcopy(shared)))
        heads = {name: Head(head, config) for name in RECIPES[config.recipe]}
        self.shared = nn.Sequential(*blocks).requires_grad_(True)
        self.heads = nn.ModuleDict(heads).requires_grad_(True)
        # Drawn once and shared by all images, so that a prediction depends on its image alone.
        generator = torch.Generator().manual_seed(config.seed)
        (self.classes, features), keep = layers(head)[-1].weight.shape, 1 - config.dropout
        draws = torch.rand(config.passes, features, generator=generator)
        self.masks = nn.Buffer((draws < keep) / keep)                       # (K, D)
        self.eval()

    def train(self, mode=True):
        """Training mode reaches the tuned part alone, and not its batch-norm statistics."""
        super().train(mode)
        self.backbone.eval()
        self.original.eval()
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(module.training and self.config.tune_batch_norm)
        return self

    @torch.no_grad()
    def predict(self, pixels, with_original=False):
        """pixels (B, 3, H, W) in [0, 1] -> Prediction. In eval mode nothing is random."""
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
        with torch.random.fork_rng(devices=[z.device] if z.is_cuda else []):
            torch.manual_seed(self.config.seed)
            for module in self.modules():
                if isinstance(module, nn.Dropout):
                    module.train()
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

def mc_dropout(classifier, features, masks):
    """MC dropout in one broadcast: features (B, D), masks (K, D) -> spread_of (B, K, C)."""
    return spread_of(classifier(features[:, None] * masks))

def spread_of(logits):
    """K passes (B, K, C) -> phi (B, C), mean of their softmax, and U_mc (B,), its standard
    deviation over passes, averaged over classes."""
    p = logits.float().softmax(-1)
    return p.mean(1), p.std(1, correction=0).mean(-1)

def kl_divergence(p, q):
    """KL(p || q) of probabilities (B, C) -> (B,), in nats; finite where one underflowed."""
    tiny = torch.finfo(p.dtype).tiny
    return (p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum(-1)

def select_head(phi, uncertainty, rule="kl-u"):
    """Eq. 6: argmin over k in {c, u} of U_k * KL(phi_m || phi_k); a tie goes to the clean head.
    phi {head: (B, C)}, uncertainty {head: (B,)} -> (B,) index into HEADS. The other rules are the
    ablation of Sec. 5.3: either factor alone, or the largest probability.
    """
    kl = lambda k: kl_divergence(phi["combined"], phi[k])
    score = {"kl-u": lambda k: uncertainty[k] * kl(k), "u": uncertainty.get, "kl": kl,
             "confidence": lambda k: -phi[k].amax(-1)}[rule]
    clean = score("clean") <= score("unclean")
    return torch.where(clean, HEADS.index("clean"), HEADS.index("unclean"))

# --- Recipes: ours, and the paper's baselines (Sec. 5) --------------------------------------------

RECIPES = {"ours": HEADS,         # the heads that are tuned; three learn from both teachers
           "apt": ("combined",)}  # augmentation based partial fine-tuning: from labels alone

def student_loss(student, teacher, pixels, labels, is_clean):
    """Fig. 4 in training: pixels (B, 3, H, W), labels and is_clean (B,) -> Eq. 5, a scalar."""
    config, targets = student.config, None
    with torch.no_grad():
        z = student.backbone(pixels)                                        # M_b, once for both
        if teacher is not None:
            targets = torch.empty(len(labels), student.classes, device=z.device)
            if is_clean.any():
                targets[is_clean] = student.original(z[is_clean]).float()   # M, on clean examples
            if not is_clean.all():
                targets[~is_clean] = teacher(pixels[~is_clean]).float()     # M_t, on augmented ones
    h = student.shared(z)                                                   # M_s
    rows = examples_of(is_clean)
    logits = {name: head(h[rows[name]])                                     # M_h, on its own kind
              for name, head in student.heads.items() if rows[name].any()}
    return generalized_distillation(logits, targets, labels, is_clean, config.temperature,
                                    config.distill_weight)

# --- Data: D^a, clean and augmented views (Secs. 4.2, 4.3) ----------------------------------------

def image_folder(folder):
    """([(path, label)], class names) of a folder of class folders; raises Refusal, naming it."""
    try:
        found = torchvision.datasets.ImageFolder(folder)
    except OSError as error:
        raise Refusal(f"{folder}: {str(error).split(' Supported')[0]} Expected CLASS/IMAGE "
                      "files, or train/ and val/ that hold them.") from error
    return found.samples, found.classes

def noise2net(image):
    """DeepAugment's weight-free form [10]: y + eps * f(y), four times, on one normalised image
    (3, H, W) in [0, 1]; f is a Res2Net block whose weights come from torch's generator."""
    def convolve(x, channels, kernel=1, dilation=1):
        bound = (x.shape[1] * kernel**2) ** -0.5
        weight = torch.empty(channels, x.shape[1], kernel, kernel).uniform_(-bound, bound)
        return F.conv2d(x, weight, padding=kernel // 2 * dilation, dilation=dilation)

    mean, std = (torch.tensor(s)[:, None, None] for s in (IMAGENET_MEAN, IMAGENET_STD))
    y = ((image - mean) / std)[None]
    for _ in range(4):
        first, *groups = F.relu(F.instance_norm(convolve(y, 16))).chunk(4, dim=1)
        outputs = [first]
        for group in groups:
            kernel, dilation = (1, 1) if torch.rand(()) < 0.5 else (3, int(torch.randint(1, 4, ())))
            f = convolve(group + outputs[-1], 4, kernel, dilation)
            outputs.append(F.relu(F.instance_norm(f)))
        y = y + torch.empty(()).uniform_(0.375, 0.75) * convolve(torch.cat(outputs, dim=1), 3)
    return (y[0] * std + mean).clamp(0, 1)

class Views(Dataset):
    """Views of images, each a function of (seed, epoch, index) alone, whatever workers and ranks.
    An item is (pixels uint8, label, is_clean, unreadable). `kind` tells the pixels: "coin", D^a as
    the student sees it, (3, H, W) clean or augmented by a fair coin; "triple", (3, 3, H, W), one
    clean view and two augmented; "centre", (3, H, W), nothing random, for measuring. Samples from
    `own` on are augmented already (--extra-data): no coin makes them clean. The next readable image
    replaces an unreadable one, whose index is `unreadable`, else -1.
    """

    def __init__(self, samples, size, kind, config, own=None):
        self.samples, self.kind, self.config, self.epoch = samples, kind, config, 0
        self.own, small = len(samples) if own is None else own, size <= 64
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
        for step in range(len(self)):
            path, label = self.samples[(index + step) % len(self)]
            try:
                image = v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
                return image, label, index if step else -1
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow's
                continue
        raise Refusal(f"{path}: none of the images can be read")

    def augmented(self, view):
        if "deepaugment" in self.config.augment and torch.rand(()) < 0.5:
            view = (noise2net(view / 255) * 255).byte()
        return view if self.config.augment == "none" else self.augmix(view)

    def __getitem__(self, index):
        image, label, unreadable = self.read(index)
        state = np.random.SeedSequence((self.config.seed, self.epoch, index)).generate_state(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(state[0]))
            is_clean = bool(torch.rand(()) < 0.5) and index < self.own      # beta of Eq. 5
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
        views.epoch, whole = epoch, max(1, len(order) // (batch * PROCESSES)) * batch
        order = np.random.default_rng((config.seed, epoch)).permutation(order)
        order = order[RANK::PROCESSES][:whole]
    return DataLoader(views, batch, sampler=order.tolist(), num_workers=config.workers)

def measured(views, config, title=None):
    """(pixels in [0, 1], labels) of every image in order, on the device; a `title` shows progress.
    Raises Refusal at an unreadable image, since skipping it in silence would change the score.
    """
    batches = loader(views, config)
    for pixels, labels, _, unreadable in tqdm(batches, title, disable=not title, mininterval=2):
        if (unreadable >= 0).any():
            raise Refusal(f"{views.samples[int(unreadable.max())][0]}: cannot be read; mend it or "
                          "remove it")
        yield pixels.to(config.device) / 255, labels.to(config.device)

# --- Networks: splitting, loading, saving ---------------------------------------------------------

class Part(nn.Module):
    """A shallow copy of `net` with only the children and tensors in `keep`; runs run(net, x)."""

    def __init__(self, net, keep, run):
        super().__init__()
        self.net, self.run = copy.copy(net), run
        for kind in ("_modules", "_parameters", "_buffers"):
            self.net.__dict__[kind] = {k: v for k, v in getattr(net, kind).items() if k in keep}

    def forward(self, x):
        return self.run(self.net, x)

STAGES = "layer1 layer2 layer3 layer4"
stages = lambda net: [block for name in STAGES.split() for block in getattr(net, name)]
token = lambda x, alone: x[:, :1] if alone else x  # of a pooled class token, norm only that: exact

FAMILIES = {  # what holds the blocks; what follows them; the classifier; blocks; stem; pool
    "open_clip VisionTransformer": (
        "transformer", "ln_post attn_pool proj", "", lambda n: n.transformer.resblocks,
        lambda n, x: n._embeds(x), lambda n, x: n._pool(
            token(x, n.pool_type == "tok" and n.attn_pool is None))[0] @ n.proj),
    "open_clip ModifiedResNet": (
        STAGES, "attnpool", "", stages, lambda n, x: n.stem(x), lambda n, x: n.attnpool(x)),
    "timm VisionTransformer": (
        "blocks", "norm fc_norm attn_pool head_drop head", "head", lambda n: n.blocks,
        lambda n, x: n.norm_pre(n.patch_drop(n._pos_embed(n.patch_embed(x)))),
        lambda n, x: n.forward_head(n.norm(token(x, n.global_pool == "token")))),
    "timm ResNet": (
        STAGES, "global_pool fc", "fc", stages,
        lambda n, x: n.maxpool(n.act1(n.bn1(n.conv1(x)))), lambda n, x: n.forward_head(x)),
    "timm ConvNeXt": (
        "stages", "norm_pre head", "head.fc", lambda n: [
            block if i else nn.Sequential(stage.downsample, block)
            for stage in n.stages for i, block in enumerate(stage.blocks)],
        lambda n, x: n.stem(x), lambda n, x: n.forward_head(n.norm_pre(x))),
    "torchvision ResNet": (
        STAGES, "avgpool fc", "fc", stages, lambda n, x: n.maxpool(n.relu(n.bn1(n.conv1(x)))),
        lambda n, x: n.avgpool(x).flatten(1)),
    "torchvision VisionTransformer": (
        "encoder", "ln heads", "heads.head", lambda n: n.encoder.layers,
        lambda n, x: n.dropout(n.pos_embedding + torch.cat(
            [n.class_token.expand(len(x), -1, -1), n._process_input(x)], dim=1)),
        lambda n, x: n.heads(n.ln(x[:, 0])))}

def sections(net):
    """(stem, blocks, pool, classifier) of a library's network (Sec. 4.1), which loses its
    classifier; raises Refusal. `pool` takes the last block's activations to one vector (B, D)."""
    kind = f"{type(net).__module__.split('.')[0]} {type(net).__name__}"
    if kind not in FAMILIES:
        raise Refusal(f"cannot split a {kind}: not one of {', '.join(FAMILIES)}; give "
                      "RobustStudent your own modules")
    body, last, classifier, blocks, stem, pool = FAMILIES[kind]
    if kind == "torchvision VisionTransformer":
        for name in ("pos_embedding", "dropout", "ln"):
            setattr(net, name, getattr(net.encoder, name))
    fitted = net.get_submodule(classifier) if classifier else None
    if classifier:
        net.set_submodule(classifier, nn.Identity())
    first = {*net._modules, *net._parameters} - {*body.split(), *last.split()}
    return Part(net, first, stem), blocks(net), Part(net, last.split(), pool), fitted

class Network(nn.Module):
    """A whole network M as stem, blocks, pool, classifier: pixels (B, 3, H, W) -> logits (B, C).
    size: input size in pixels; source: arguments that rebuild its architecture; text_embeddings:
    class names -> ((C, D), scale) for CLIP, else None; class_names: None where unknown.
    """

    def __init__(self, net, size, mean, std, text_embeddings, source):
        super().__init__()
        stem, blocks, self.pool, classifier = sections(net)
        resize = v2.Resize((size, size), v2.InterpolationMode.BICUBIC)  # does nothing at that size
        self.stem = nn.Sequential(resize, v2.Normalize(mean, std), stem)
        self.blocks = nn.Sequential(*blocks)
        self.classifier = classifier if isinstance(classifier, nn.Linear) else None
        self.size, self.text_embeddings, self.source = size, text_embeddings, source
        self.class_names = None

    def features(self, x):
        """pixels (B, 3, H, W) in [0, 1] -> (B, D), what the classifier sees."""
        return self.pool(self.blocks(self.stem(x)))

    def forward(self, x):
        return self.classifier(self.features(x))

    @torch.no_grad()
    def predict(self, pixels, with_original=False):
        """As RobustStudent.predict, with one predictor, "model", and no heads."""
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
    """RobustStudent of a Network cut at (K, N): M = M_h . M_s . M_b, Eq. 1."""
    blocks, (k, n) = list(network.blocks), at
    student = RobustStudent(nn.Sequential(network.stem, *blocks[:k]), nn.Sequential(*blocks[k:n]),
                            nn.Sequential(*blocks[n:], network.pool, network.classifier), config)
    for name in ("size", "class_names", "text_embeddings"):
        setattr(student, name, getattr(network, name))
    student.origin = {"split": at, "class_names": network.class_names,
                      "classifier": network.classifier.state_dict()}
    return student

def load_network(name, pretrained="", image_size=0, model_args=None, seed=0):
    """A Network by open_clip, timm or torchvision name, NAME:FILE, or a .pt of --make-teacher.
    Random weights (`none`) come from `seed`. Raises Refusal.
    """
    if name.endswith(".pt") and ":" not in name:
        saved = read_tensors(name, "network")
        network = load_network(**saved["source"])
        network.classifier = classifier_from(saved["state"], "classifier.")
        network.load_state_dict(saved["state"])
        network.stem[1] = v2.Normalize(*saved["mean_and_std"])  # a tag's may differ from its name's
        network.class_names = saved["class_names"]
        return network
    name, _, file = name.partition(":")
    file = pretrained if Path(pretrained).is_file() else file
    tag = None if file or pretrained == "none" else pretrained  # "" is the default
    unimodal = timm.is_model(name) or name in torchvision.models.list_models()
    if not unimodal and name not in open_clip.list_models():  # it has a convnext_tiny as timm has
        raise Refusal(f"{name}: not an open_clip, timm or torchvision name, nor a .pt file")
    torch.manual_seed(seed)
    try:
        whole, net, *others = (build_unimodal if unimodal else build_clip)(
            name, tag, image_size, model_args or {})
        if 0 < image_size <= 64 and hasattr(net, "maxpool"):
            if tag is not None:
                raise Refusal(f"--image-size {image_size}: {name} gets a 3x3 stem, for which there "
                              "are no weights; give --pretrained none or NAME:FILE")
            first, *rest = layers(net.conv1)  # a strided 7x7 stem is wrong here: 3x3, no pooling
            small = nn.Conv2d(3, first.out_channels, 3, padding=1, bias=False)
            net.conv1, net.maxpool = nn.Sequential(small, *rest) if rest else small, nn.Identity()
        if file:
            state = read_tensors(file)
            state = state.get("state_dict", state.get("model", state))
            whole.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, OSError) as error:
        # an unknown tag or argument, weights that do not fit or cannot be had
        raise Refusal(f"{name}: {str(error)[:300]} (--pretrained takes TAG, FILE, none)") from error
    # What rebuilds the architecture; of CLIP also the activation and the text encoder.
    source = dict(name=name, pretrained="none" if unimodal else file or pretrained,
                  image_size=image_size or others[0], model_args=model_args, seed=seed)
    return Network(net, *others, source)

def build_clip(name, tag, image_size, args):
    """(whole, image tower, size, mean, std, text_embeddings). OpenAI's weights need QuickGELU."""
    tag = "openai" if tag == "" else tag
    known = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    clip = open_clip.create_model(name, pretrained=tag, force_image_size=image_size or None,
                                  force_quick_gelu=known.get("quick_gelu", False), **args).eval()
    tokenizer, prepare = open_clip.get_tokenizer(name), clip.visual.preprocess_cfg

    def text_embeddings(names, templates=open_clip.OPENAI_IMAGENET_TEMPLATES):
        """phi_text(Y) (C, D), the mean over templates, and exp(logit_scale) (Sec. 4.4)."""
        known = dict(zip(timm.data.ImageNetInfo().label_names(), open_clip.IMAGENET_CLASSNAMES))
        names = [known.get(name, name.replace("_", " ")) for name in names]
        weight = open_clip.build_zero_shot_classifier(clip, tokenizer, names, templates).T
        return weight.contiguous(), clip.logit_scale.exp().item()

    size = int(np.max(clip.visual.image_size))
    return clip, clip.visual, size, prepare["mean"], prepare["std"], text_embeddings

def build_unimodal(name, tag, image_size, args):
    """As build_clip, for a timm or torchvision name; with the weights' own size, mean and std."""
    if image_size and ("vit" in name or "deit" in name):
        args = {"img_size" if timm.is_model(name) else "image_size": image_size, **args}
    if not timm.is_model(name):
        net = torchvision.models.get_model(name, weights="DEFAULT" if tag == "" else tag, **args)
        size = image_size or getattr(net, "image_size", 224)
        return net, net, size, IMAGENET_MEAN, IMAGENET_STD, None
    net = timm.create_model(f"{name}.{tag}" if tag else name, pretrained=tag is not None, **args)
    known = net.pretrained_cfg
    return net, net, image_size or known["input_size"][-1], known["mean"], known["std"], None

def name_classes(model, names, templates=open_clip.OPENAI_IMAGENET_TEMPLATES):
    """Give a CLIP Network, or a student of --zero-shot, new classes (Sec. 4.4)."""
    weight, scale = model.text_embeddings(names, templates)
    model.class_names, model.classes = names, len(names)
    if isinstance(model, Network):
        model.classifier = CosineClassifier(weight, scale, trained=False)
    for module in model.modules():
        if isinstance(module, CosineClassifier):
            module.weight = weight.to(module.weight.device)

def classifier_from(state, prefix="", trained=True):
    """The classifier whose tensors stand under `prefix` in a state dict."""
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if "scale" in own:
        return CosineClassifier(own["weight"], own["scale"], trained)
    classifier = nn.Linear(*reversed(own["weight"].shape), bias="bias" in own)
    classifier.load_state_dict(own)
    return classifier

def read_tensors(path, kind=None):
    """Tensors and plain data of a file, by weights_only=True; `kind`: "network", "plug-in",
    "network or plug-in". Raises Refusal; no code in the file ever runs."""
    if not Path(path).is_file():
        make = "--make-teacher vit_b_16 --data imagenet/" if kind == "network" else \
            "--student ViT-L-14 --teacher vit_b16.pt"
        raise Refusal(f"{path}: no such file" + (
            f"; make it with: python robustify.py {make} --out {path}" if kind else ""))
    try:
        with warnings.catch_warnings(action="ignore"):  # of old pickles, which are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file may raise anything
        raise Refusal(f"{path}: not a readable checkpoint (truncated, of another format, or with "
                      "code in it); make or download it again") from error
    found = content.get("format") if isinstance(content, dict) else None
    if kind and found not in [f"robustify {k}" for k in kind.split(" or ")]:
        raise Refusal(f"{path}: not a {kind} that robustify.py wrote")
    return content

def write_tensors(content, path):
    """Write atomically: a crash or a full disk leaves the older file whole. Raises OSError."""
    buffer, temporary = io.BytesIO(), Path(f"{path}.{os.getpid()}.part")
    torch.save(content, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            os.fsync(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

FROZEN = ("backbone.", "original.")  # what a plug-in does not hold

def fingerprint(student):
    """sha256 over names, shapes and bytes of the frozen network M: backbone and original."""
    digest = hashlib.sha256()
    for name, tensor in student.state_dict().items():
        if name.startswith(FROZEN):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

def save(student, path):
    """The plug-in: tuned part, config, class names, where M comes from and its fingerprint."""
    tuned = {k: v for k, v in student.state_dict().items() if not k.startswith(FROZEN)}
    write_tensors({"format": "robustify plug-in", "tuned": tuned, "config": asdict(student.config),
                   "fingerprint": fingerprint(student), **student.origin}, path)

def load(path, backbone=None, shared=None, head=None, class_names=None):
    """robust.pt -> RobustStudent; with backbone, shared and head where they were your own modules.
    `class_names` gives a zero-shot student new classes. Raises Refusal where the file is no plug-in
    or was tuned on other weights.
    """
    saved = read_tensors(path, "plug-in")
    config = Config(**saved["config"])
    if backbone is not None:
        student = RobustStudent(backbone, shared, head, config)
    elif "split" not in saved:
        raise Refusal(f"{path}: tuned on modules of your own; give backbone, shared and head")
    else:
        network = load_network(config.student, config.pretrained, config.image_size,
                               config.model_args, config.seed)
        network.classifier = classifier_from(saved["classifier"], trained=not config.zero_shot)
        network.class_names = saved["class_names"]
        student = assemble(network, saved["split"], config)
    if (found := fingerprint(student)) != saved["fingerprint"]:
        raise Refusal(f"{path}: tuned on a network with fingerprint {saved['fingerprint'][:16]}, "
                      f"this one has {found[:16]}; load the weights that it was tuned on")
    student.load_state_dict(saved["tuned"], strict=False)  # all that is not FROZEN
    if class_names:
        if backbone is not None or not config.zero_shot:
            raise Refusal(f"{path}: only a CLIP student of --zero-shot takes new class names")
        name_classes(student, class_names)
    return student

# --- The robust teacher (Sec. 4.2) and the training loop ------------------------------------------

def teacher_loss(network, jsd, pixels, labels):
    """Cross-entropy of pixels (B, 3, H, W); of a "triple" (B, 3, 3, H, W) the published AugMix loss
    [12]: cross-entropy of the clean view + jsd * Jensen-Shannon divergence of all three."""
    if pixels.ndim == 4:
        return F.cross_entropy(network(pixels).float(), labels)
    logits = network(pixels.transpose(0, 1).flatten(0, 1)).float()
    views = logits.softmax(-1).unflatten(0, (3, -1))
    divergence = torch.stack([kl_divergence(p, views.mean(0)) for p in views]).mean()
    return F.cross_entropy(logits[:len(labels)], labels) + jsd * divergence

def accuracy(model, views, config):
    """{predictor: share of right answers, 0 to 1} of a Network or RobustStudent."""
    right = {}
    for pixels, labels in measured(views, config):
        for name, p in model.eval().predict(pixels, with_original=True).everyone.items():
            right[name] = right.get(name, 0) + int((p.argmax(-1) == labels).sum())
    return {name: n / len(views) for name, n in right.items()}

def fit(loss_of, model, views, validation, config, write):
    """Minimise loss_of(pixels, labels, is_clean); after each epoch validate model and `write()`."""
    model.to(config.device, memory_format=torch.channels_last)  # 1.5 times as fast on ResNets
    tuned = [p for p in model.parameters() if p.requires_grad]
    kind, extra = {"adamw": (torch.optim.AdamW, {}),
                   "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})}[config.optimizer]
    optimizer = kind(tuned, config.lr, weight_decay=config.weight_decay, **extra)
    steps, replaced = config.epochs * len(loader(views, config, epoch=0)), set()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(
        1, 20 * (s + 1) / steps) * (0.5 + 0.5 * np.cos(np.pi * s / steps)))
    for epoch in range(config.epochs):
        bar = tqdm(loader(views, config, epoch), f"epoch {epoch + 1}/{config.epochs}",
                   unit=" images", unit_scale=config.batch_size, mininterval=2, disable=RANK > 0)
        model.train()
        start = ready = time.perf_counter()
        waited = 0.0
        for step, (pixels, labels, is_clean, unreadable) in enumerate(bar):
            waited += time.perf_counter() - ready
            replaced |= set(unreadable[unreadable >= 0].tolist())
            pixels, labels, is_clean = (t.to(config.device) for t in (pixels, labels, is_clean))
            with torch.autocast("cuda", torch.bfloat16, enabled=config.device == "cuda"):
                loss = loss_of(pixels / 255, labels, is_clean)
            if not np.isfinite(value := loss.item()):
                raise Refusal(f"the loss became {value} in epoch {epoch + 1}, step {step + 1}; the "
                              "last checkpoint stays; try a lower --lr or --temperature")
            optimizer.zero_grad()
            loss.backward()
            for p in tuned if PROCESSES > 1 else []:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad.div_(PROCESSES))
            nn.utils.clip_grad_norm_(tuned, 1.0)  # T^2 scales gradients
            optimizer.step()
            schedule.step()
            ready = time.perf_counter()
            bar.set_postfix_str(f"loss {value:.3f}, {waited / (ready - start):.0%} waiting for "
                                "data", refresh=False)
        if RANK == 0:
            if validation:
                scores = accuracy(model, validation, config).items()
                print(f"epoch {epoch + 1}:", *(f"{k} {100 * v:.1f}" for k, v in scores), flush=True)
            write()
    if replaced and RANK == 0:
        print(f"{len(replaced)} unreadable images were replaced by the next readable one: "
              + ", ".join(str(views.samples[i][0]) for i in sorted(replaced)[:3]))

def prepare(name, kind, config, teacher=""):
    """(Network, teacher or None, Views, validation Views or None) for --data and --extra-data; a
    wrong folder is refused before any network is built. Raises Refusal."""
    parts = [Path(config.data, part) for part in ("train", "val", "test")]
    train, *held_out = [p for p in parts if p.is_dir()] if parts[0].is_dir() else [config.data]
    samples, names = image_folder(train)
    if config.limit:
        keep = np.random.default_rng(config.seed).permutation(len(samples))[:config.limit]
        samples = [samples[i] for i in sorted(keep)]
    others = [(folder, *image_folder(folder)) for folder in (*held_out[:1], *config.extra_data)]
    teacher = load_network(teacher).to(config.device).eval() if teacher else None
    network = load_network(name, config.pretrained, config.image_size, config.model_args,
                           config.seed)
    for what, _, classes in (*others, (name, None, network.class_names),
                             (config.teacher, None, getattr(teacher, "class_names", None))):
        if classes is not None and list(classes) != names:
            raise Refusal(f"{what} has {len(classes)} classes ({', '.join(classes[:3])} ...), but "
                          f"--data {len(names)} ({', '.join(names[:3])} ...): they must agree")
    if teacher and (teacher.classifier is None or len(teacher.classifier.weight) != len(names)):
        raise Refusal(f"--teacher {config.teacher}: has no classifier of the {len(names)} classes "
                      "in --data; see --make-teacher")
    network.class_names = names
    give_classifier(network, samples, config)
    validation = Views(others.pop(0)[1], network.size, "centre", config) if held_out else None
    views = Views(samples + [s for _, extra, _ in others for s in extra], network.size, kind,
                  config, len(samples))
    if RANK == 0:
        print(f"network   {name}, {count(network) / 1e6:.2f} M parameters, {network.size} px\n"
              f"images    {len(views)}, {len(names)} classes, {len(validation or [])} to validate\n"
              f"training  {config.epochs} epochs, {config.epochs * len(loader(views, config, 0))} "
              f"steps of {config.batch_size} images ({config.augment}), {config.optimizer}, lr "
              f"{config.lr:g}, on {config.device}; writes {config.out}", flush=True)
    return network, teacher, views, validation

def linear_probe(features, labels, classifier, weight_decay=1e-4):
    """Fits the module `classifier` in place to features (n, D) and labels (n,) by L-BFGS (Sec. 5):
    mean cross-entropy + weight_decay * squared norm."""
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=1000,
                                  line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        total = weight_decay * sum(p.square().sum() for p in classifier.parameters())
        total.backward()
        for x, y in zip(features.split(8192), labels.split(8192)):
            loss = F.cross_entropy(classifier(x), y, reduction="sum") / len(labels)
            loss.backward()
            total = total + loss.detach()
        return total

    optimizer.step(objective)

def give_classifier(network, samples, config):
    """Where the network has no classifier for its class names: text embeddings, or a new layer; in
    VE a student's is then fitted as a linear probe on features of centre crops (Sec. 5)."""
    own, names = network.classifier, network.class_names
    if own is not None and len(own.weight) == len(names) and not config.zero_shot:
        return
    if network.text_embeddings:
        network.classifier = CosineClassifier(*network.text_embeddings(names), not config.zero_shot)
    elif config.zero_shot:
        raise Refusal(f"--zero-shot needs a student with a text encoder, not {config.student}")
    else:
        network.classifier = nn.LazyLinear(len(names))
        network.eval()(torch.zeros(1, 3, network.size, network.size))  # tells it the width
    if config.zero_shot or config.make_teacher:
        return
    network.eval().to(config.device)
    views = Views(samples, network.size, "centre", config)
    with torch.no_grad():
        features, labels = (torch.cat(column) for column in zip(*(
            (network.features(x), y) for x, y in measured(views, config, "linear probe"))))
    linear_probe(features, labels, network.classifier)

def make_teacher(config):
    """Sec. 4.2: train a small network whole on D^a, or plainly with --augment none; write it."""
    kind = "triple" if config.jsd and config.augment != "none" else "coin"
    network, _, views, validation = prepare(config.make_teacher, kind, config)
    fit(lambda pixels, labels, _: teacher_loss(network, config.jsd, pixels, labels), network, views,
        validation, config, lambda: write_tensors(
            {"format": "robustify network", "source": network.source, "state": network.state_dict(),
             "class_names": network.class_names,
             "mean_and_std": [list(network.stem[1].mean), list(network.stem[1].std)]}, config.out))

def tune_student(config):
    """Sec. 4.3: cut the student, plug in the heads, tune them on D^a, write the plug-in."""
    heads, distil = RECIPES[config.recipe], len(RECIPES[config.recipe]) > 1
    if distil and not config.teacher:
        raise Refusal(f"--recipe {config.recipe} needs --teacher FILE.pt; see --make-teacher")
    network, teacher, views, validation = prepare(config.student, "coin", config,
                                                  config.teacher if distil else "")
    k, n = at = split(network, config.fraction, config.head_blocks)
    shared, head = (count(*parts) / count(network) for parts in (
        network.blocks[k:n], (network.blocks[n:], network.pool, network.classifier)))
    if RANK == 0:
        print(f"tuned     blocks {k + 1}-{n} shared, {n + 1}-{len(network.blocks)} in each head: "
              f"{shared + head:.1%}, with all heads {shared + len(heads) * head:.1%}\n"
              f"heads     {', '.join(heads)}; teacher {config.teacher if distil else 'none'}")
    student = assemble(network, at, config)
    fit(lambda *batch: student_loss(student, teacher, *batch), student, views, validation, config,
        lambda: save(student, config.out))

# --- The demo: the whole method on drawn shapes, with no download ---------------------------------

SHAPES = "disk ring square frame triangle outline bar slit".split()

def draw(index, rng):
    """A shape on a grating, uint8 (32, 32, 3). A faint fine texture gives the class away: a cue
    that a plainly trained network takes, and that noise and blur destroy."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    wave = lambda rate, angle: np.sin(rate * (x * np.cos(angle) + y * np.sin(angle)))[..., None]
    u, v = ((x, y) - rng.uniform(-0.3, 0.3, (2, 1, 1))) / rng.uniform(0.4, 0.8)
    angle, corners = np.arctan2(v, u) + rng.uniform(-0.3, 0.3), (30, 4, 3, 0)[index // 2]
    radius = np.hypot(u, v) * np.cos(angle % (2 * np.pi / corners) - np.pi / corners) if corners \
        else np.maximum(abs(u) * 3, abs(v)) - 0.2
    image = rng.uniform(0.2, 0.8, 3) + 0.2 * wave(rng.uniform(4, 12), rng.uniform(0, np.pi))
    image[(radius < 0.7) & (radius > 0.35 * (index % 2))] = rng.uniform(0, 1, 3)
    image += 0.1 * (rng.random() < 0.7) * wave(40, np.pi * index / 8)
    return (255 * (image + rng.normal(0, 0.03, image.shape)).clip(0, 1)).astype(np.uint8)

def demo(folder="demo"):
    """Draw the images, train a stand-in large student and a robust teacher, run ours and APT."""
    rng = np.random.default_rng(0)
    for i in range(3000):
        path = Path(folder, "train" if i < 2400 else "val", SHAPES[i % 8], f"{i:04}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(i % 8, rng)).save(path)
    config = Config(data=folder, pretrained="none", image_size=32, severity=4, batch_size=64,
                    lr=3e-3, epochs=9, jsd=0.0, workers=2)
    for name, augment, depths, widths in (
            ("student", "none", (1, 1, 2, 6), (16, 32, 32, 32)),
            ("teacher", config.augment, (1, 1, 1, 1), (8, 16, 32, 48))):
        args = {"layers": depths, "channels": widths, "stem_type": "deep", "stem_width": 8}
        make_teacher(replace(config, make_teacher="resnet18", model_args=args,
                             augment=augment, out=f"{folder}/{name}.pt"))
    for recipe in ("ours", "apt"):
        tune_student(replace(config, student=f"{folder}/student.pt", teacher=f"{folder}/teacher.pt",
                             recipe=recipe, epochs=4, lr=1e-3, out=f"{folder}/{recipe}.pt"))
    print(f"now measure what lies in {folder}/ with: python eval.py")

# --- main -----------------------------------------------------------------------------------------

def refuse(message):
    """Raises Refusal: what argparse shall do with an error."""
    raise Refusal(message)

def parse(arguments):
    """Config from the command line; its comments are the help. Raises Refusal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    comments = dict(re.findall(r"    (\w+): .*?  # (.*)", inspect.getsource(Config)))
    how = {bool: {"action": "store_true"}, tuple: {"nargs": "*"}, dict: {"type": json.loads}}
    for f in fields(Config):
        choices = RECIPES if f.name == "recipe" else get_args(f.type) or None
        kind = how.get(f.type, {"type": type(f.default), "choices": choices})
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=f.default,
                            help=comments[f.name], **kind)
    config = Config(**vars(parser.parse_args(arguments)))
    config.out = config.out or ("teacher.pt" if config.make_teacher else "robust.pt")
    if not Path(config.out).parent.is_dir():
        raise Refusal(f"--out {config.out}: make its folder first")
    if Path(config.out) in map(Path, (config.student, config.teacher, config.pretrained)):
        raise Refusal(f"--out {config.out}: would overwrite what it is made from")
    limits = {"epochs": (1, np.inf), "batch_size": (1, np.inf), "passes": (2, np.inf),
              "severity": (1, 10), "dropout": (0.01, 0.99), "block_dropout": (0, 0.99)}
    for name, value in vars(config).items():
        low, high = limits.get(name, (0, np.inf))
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise Refusal(f"--{name.replace('_', '-')}: from {low} to {high}")
    return config

def join_processes(device):
    """Under torchrun: let this process speak with the others, on its own GPU."""
    if PROCESSES > 1:
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo",
                                             timeout=timedelta(hours=2))  # they wait for rank 0
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

def run(arguments):
    """What the command line asks for; raises Refusal and OSError."""
    config = parse(arguments)
    join_processes(config.device)
    if not arguments:
        demo()
    elif config.make_teacher or config.student:
        (make_teacher if config.make_teacher else tune_student)(config)
    else:
        raise Refusal("give --student or --make-teacher, or no argument at all for the demo")

def main(arguments=None, run=run):
    """run(command line) -> exit code: 2, after one line on stderr, for a Refusal or OSError."""
    logging.disable(logging.ERROR)  # open_clip logs what a Refusal says
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except (Refusal, OSError) as error:
        program, text = Path(run.__code__.co_filename).name, " ".join(str(error).split())
        print(f"{program}: {text.rpartition('Refusal: ')[2]}", file=sys.stderr)  # from a worker
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
