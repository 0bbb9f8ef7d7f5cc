"""Measure networks and robustify.py's plug-ins under distribution shift (Secs. 3 and 5).

    python eval.py                                                # what the demo left in demo/
    python eval.py --data imagenet-c/                             # --model robust.pt
    python eval.py --data imagenet/ imagenetv2/ imagenet-r/ imagenet-c/ --model apt.pt robust.pt
    python eval.py --data objectnet/ --corrupt --frost frost/     # ObjectNet-C, made in memory
    python eval.py --data imagenet-c/ --model resnet50 ViT-B-32 --plot severity.png    # Sec. 3
    python eval.py --transfer flowers/                            # linear probes, Tables 1 and 3
    python eval.py --cost                                         # latency columns

A folder is recognised by its layout: ImageNet-C (CORRUPTION/SEVERITY/CLASS/), CIFAR-10-C (arrays
CORRUPTION.npy beside labels.npy), ObjectNet (images/ and mappings/), numeric class folders
(ImageNetV2: the folder is the label), a subset of the model's classes by folder name (ImageNet-R,
-A: decided among the subset; the row "of all" among all classes), any class folders. One named val
or test, or that holds one, of classes that a model was made for, is a clean set; the others are
shifts, averaged at the end. Small square images are measured whole, at their own size.

Of a plug-in each predictor is measured in one pass: the original, each head, the selected one, and
the oracle, which is right where the clean or the unclean head is.
"""

import argparse
import functools
import importlib.util
import io
import json
import math
import re
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm

import robustify
from robustify import (HEADS, PROCESSES, RANK, RECIPES, Config, Refusal, RobustStudent, Views,
                       count, image_folder, join_processes, linear_probe, load, load_network,
                       measured, name_classes, read_tensors, refuse, student_loss)

ALEXNET = dict(  # top-1 error of AlexNet [11], for mCE
    gaussian_noise=.886428, shot_noise=.894468, impulse_noise=.922640, defocus_blur=.819880,
    glass_blur=.826268, motion_blur=.785948, zoom_blur=.798360, snow=.866816, frost=.826572,
    fog=.819324, brightness=.564592, contrast=.853204, elastic_transform=.646056, pixelate=.717840,
    jpeg_compression=.606500)
ALEXNET_CLEAN = 0.43478
IMAGENET = timm.data.ImageNetInfo().label_names()  # class folders, in the order of the outputs
DEMO = "speckle_noise gaussian_blur saturate impulse_noise defocus_blur jpeg_compression".split()

# --- Corruptions [11], batched; parameters for severity 1-5 at 224, 64 and 32 px ------------------

CORRUPTIONS = {}  # name -> function of x (B, 3, n, n) in [0, 1], draw, parameters; {n: parameters}
ROUNDING = 1e-4  # the original truncates to 8 bits: keeps what is exact there exact in float32

def corruption(*parameters):
    """Register a function under its name; the parameters of each size, for five severities."""
    def register(function):
        CORRUPTIONS[function.__name__] = function, dict(zip((224, 64, 32), parameters))
        return function
    return register

@corruption((.08, .12, .18, .26, .38), (.04, .08, .12, .15, .18), (.04, .06, .08, .09, .1))
def gaussian_noise(x, draw, sigma):
    return x + sigma * draw(lambda g: torch.randn(x.shape[1:], generator=g))

@corruption((60, 25, 12, 5, 3), (250, 100, 50, 30, 15), (500, 250, 100, 75, 50))
def shot_noise(x, draw, rate):
    return draw(lambda g, image: torch.poisson(image, g), (x * rate).cpu()) / rate

@corruption((.03, .06, .09, .17, .27), (.01, .02, .05, .08, .14), (.01, .02, .03, .05, .07))
def impulse_noise(x, draw, amount):
    u = draw(lambda g: torch.rand(x.shape[1:], generator=g))
    return torch.where(u < amount / 2, 0, torch.where(u < amount, 1, x))

@corruption(((3, .1), (4, .5), (6, .5), (8, .5), (10, .5)), ((.5, .6), (1, .1), (1.5, .1),
            (2.5, .01), (3, .1)), ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)))
def defocus_blur(x, draw, radius, alias):
    """A disk, smoothed by a Gaussian of sigma `alias`."""
    grid, reach = torch.arange(-max(8, radius), max(8, radius) + 1.0), 1 if radius <= 8 else 2
    disk = (grid[:, None]**2 + grid**2 <= radius**2).float()
    blur = (-torch.arange(-reach, reach + 1)**2 / (2 * alias**2)).softmax(0)
    disk = F.pad((disk / disk.sum())[None, None], (reach,) * 4, mode="reflect")
    kernel, edge = F.conv2d(disk, torch.outer(blur, blur)[None, None]).to(x), len(grid) // 2
    return F.conv2d(F.pad(x, (edge,) * 4, mode="reflect"), kernel.expand(3, -1, -1, -1), groups=3)

def gaussian(x, sigma, truncate=4, edge="edge"):
    """Gaussian filter of (..., n, n), cut at truncate * sigma; `edge` is a mode of np.pad."""
    n, radius = x.shape[-1], int(truncate * sigma + 0.5)
    reads = torch.from_numpy(np.pad(np.arange(n), radius, edge)).unfold(0, 2 * radius + 1, 1)
    kernel = (-torch.arange(-radius, radius + 1)**2 / (2 * sigma**2)).softmax(0)
    matrix = torch.zeros(n, n).scatter_add_(1, reads, kernel.expand(n, -1)).to(x)
    return matrix @ x @ matrix.T

@corruption(((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
            ((.1, 1, 1), (.5, 1, 1), (.6, 1, 2), (.7, 2, 1), (.9, 2, 2)),
            ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2)))
def glass_blur(x, draw, sigma, shift, rounds):
    """Blur, let pixels read others at random shifts, blur. A round goes from the bottom right to
    the top left and reads what it wrote before: chains, followed twice as far at each step."""
    n = x.shape[-1]
    x = (gaussian(x, sigma) * 255 + ROUNDING).floor() / 255
    moves = draw(lambda g: torch.randint(-shift, shift, (rounds, 2, n * n), generator=g))
    reads = own = torch.arange(n * n, device=x.device).expand(len(x), -1)
    low, high = torch.minimum(own // n, own % n), torch.maximum(own // n, own % n)
    inner = (low > shift) & (high <= n - shift)
    for down, right in (move.unbind(1) for move in moves.unbind(1)):
        target = torch.where(inner, own + n * down + right, own)
        written = inner.gather(1, target) & (target > own)
        follow, further = own, torch.where(written, target, own)
        while not torch.equal(follow, further):
            follow, further = further, further.gather(1, further)
        reads = reads.gather(1, target.gather(1, follow))
    return gaussian(x.flatten(2).gather(2, reads[:, None].expand(-1, 3, -1)).view_as(x), sigma)

@corruption(((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), ((10, 1), (10, 1.5), (10, 2),
            (10, 2.5), (12, 3)), ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)))
def motion_blur(x, draw, radius, sigma, low=-45, high=45):
    """ImageMagick's: a one-sided Gaussian along a line at a random angle, in whole pixels."""
    n, width = x.shape[-1], 2 * radius + 1
    weights = (-torch.arange(width)**2 / (2 * sigma**2)).softmax(0).tolist()
    blurred, padded = torch.zeros_like(x), F.pad(x, (width,) * 4, mode="replicate")
    angles = draw(lambda g: torch.empty(()).uniform_(low, high, generator=g)).deg2rad().tolist()
    for image, source, angle in zip(blurred, padded, angles):
        for i, weight in enumerate(weights):
            top, left = (width + math.ceil(i * f(angle) - 0.5) for f in (math.sin, math.cos))
            image.add_(source[:, top:top + n, left:left + n], alpha=weight)
    return blurred

def zoomed(x, factor):
    """The centre of x magnified by `factor`, as scipy's zoom of order 1 trimmed to the middle."""
    n = x.shape[-1]
    crop = math.ceil(n / factor)
    size, top = round(crop * factor), (n - crop) // 2
    x = F.interpolate(x[..., top:top + crop, top:top + crop], size=(size, size), mode="bilinear",
                      align_corners=True)
    trim = (size - n) // 2
    return x[..., trim:trim + n, trim:trim + n]

@corruption(((1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03)),
            *[((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01))] * 2)
def zoom_blur(x, draw, stop, step):
    return torch.stack([x, *(zoomed(x, z) for z in np.arange(1, stop, step))]).mean(0)

@corruption(((.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
             (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55)),
            *[((.1, .2, 1, .6, 8, 3, a), (.1, .2, 1, .5, 10, 4, b), (.15, .3, 1.75, .55, 10, 4, c),
               (.25, .3, 2.25, .6, 12, 6, d), (.3, .3, 1.25, .65, 14, 12, e))
              for a, b, c, d, e in ((.8, .8, .7, .65, .6), (.95, .9, .9, .85, .8))])
def snow(x, draw, mean, std, zoom, threshold, radius, sigma, mix):
    noise = draw(lambda g: torch.randn(x[0, :1].shape, generator=g))
    flakes = zoomed(mean + std * noise, zoom)
    flakes = (torch.where(flakes < threshold, 0, flakes).clamp(0, 1) * 255).floor() / 255
    flakes = motion_blur(flakes, draw, radius, sigma, -135, -45)
    x = mix * x + (1 - mix) * torch.maximum(x, 1.5 * v2.functional.rgb_to_grayscale(x) + 0.5)
    return x + flakes + flakes.rot90(2, (2, 3))

@functools.cache
def frost_photos(folder, scale):
    """The first five photos (the sixth was never drawn), (3, H, W) in [0, 1]; raises Refusal."""
    files = sorted(Path(folder).glob("frost*.*"))[:5]
    if len(files) < 5:
        raise Refusal(f"--frost {folder}: needs ImageNet-C's photos, frost1 to frost5")
    photos = [v2.functional.pil_to_tensor(Image.open(f).convert("RGB"))[None] / 255 for f in files]
    return [F.interpolate(p, size=[round(n * scale) for n in p.shape[2:]], mode="bilinear")[0]
            for p in photos]

@corruption(((1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75)), ((1, .3), (.9, .4), (.8, .45),
            (.75, .5), (.7, .55)), ((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45)))
def frost(x, draw, weight, amount, folder):
    n = x.shape[-1]
    photos = frost_photos(folder, float(np.interp(n, (32, 64, 224), (0.2, 0.3, 1))))

    def crop(g):
        photo = photos[torch.randint(5, (), generator=g)]
        top, left = (torch.randint(side - n, (), generator=g) for side in photo.shape[1:])
        return photo[:, top:top + n, left:left + n]

    return weight * x + amount * draw(crop)

def plasma(n, decay, generator):
    """A diamond-square fractal (n, n) in [0, 1], cut from a map of the next power of two."""
    step, amplitude = 1 << (n - 1).bit_length(), 100.0
    cloud = torch.zeros(step, step)
    jitter = lambda total: total / 4 + amplitude * torch.empty_like(total).uniform_(
        -amplitude, amplitude, generator=generator)
    while step >= 2:
        half, corners = step // 2, cloud[::step, ::step]
        pairs = corners + corners.roll(-1, 0)
        cloud[half::step, half::step] = centres = jitter(pairs + pairs.roll(-1, 1))
        cloud[::step, half::step] = jitter(
            centres + centres.roll(1, 0) + corners + corners.roll(-1, 1))
        cloud[half::step, ::step] = jitter(centres + centres.roll(1, 1) + pairs)
        step, amplitude = half, amplitude / decay
    cloud = cloud - cloud.min()
    return (cloud / cloud.max())[:n, :n]

@corruption(((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)), ((.4, 3), (.7, 3), (1, 2.5),
            (1.5, 2), (2, 1.75)), ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)))
def fog(x, draw, amount, decay):
    peak = x.amax((1, 2, 3), keepdim=True)
    cloud = draw(lambda g: plasma(x.shape[-1], decay, g))[:, None]
    return (x + amount * cloud) * peak / (peak + amount)

@corruption((.1, .2, .3, .4, .5), (.1, .2, .3, .4, .5), (.05, .1, .15, .2, .3))
def brightness(x, draw, amount):
    value = x.amax(1, keepdim=True)
    return torch.where(value > 0, x / value.clamp_min(1e-8), 1) * (value + amount).clamp_max(1)

@corruption((.4, .3, .2, .1, .05), (.4, .3, .2, .1, .05), (.75, .5, .4, .3, .15))
def contrast(x, draw, factor):
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean

@corruption(((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88),
             (29.28, 2.44, 4.88)), ((0, 0, 5.12), (3.2, 19.2, 3.84), (6.4, 5.12, 3.84),
             (6.4, 1.92, 1.92), (10.24, 1.92, 1.28)), ((0, 0, 2.56), (1.6, 6.4, 2.24),
             (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, .96, .96)))
def elastic_transform(x, draw, alpha, sigma, affine):
    """An affine map that moves three points, then smooth displacements; all in pixels."""
    n = x.shape[-1]
    old = (torch.tensor([[1.0, 1], [1, -1], [-1, -1]]) * (n // 3) + n // 2).to(x)
    uniform = lambda limit, *shape: draw(
        lambda g: torch.empty(shape).uniform_(-limit, limit, generator=g))
    new = old + uniform(affine, 3, 2)
    back = torch.linalg.solve(F.pad(new, (0, 1), value=1), old.expand_as(new))
    line = torch.arange(n, device=x.device)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).to(x)
    at = F.pad(grid, (0, 1), value=1) @ back[:, None]
    x = F.grid_sample(x, 2 * at / (n - 1) - 1, padding_mode="reflection", align_corners=True)
    if not alpha:
        return x
    moves = gaussian(uniform(1, 2, n, n), sigma, truncate=3, edge="symmetric")
    at = grid + alpha * moves.permute(0, 2, 3, 1)
    return F.grid_sample(x, (2 * at + 1) / n - 1, padding_mode="reflection", align_corners=False)

def through_pillow(x, change):
    """x (B, 3, n, n) with each image changed by change(Pillow image), through 8 bits."""
    images = [change(v2.functional.to_pil_image(i)) for i in (x * 255).round().byte().cpu()]
    return torch.stack([v2.functional.pil_to_tensor(i) for i in images]).to(x.device) / 255

@corruption((.6, .5, .4, .3, .25), (.9, .8, .7, .6, .5), (.95, .9, .85, .75, .65))
def pixelate(x, draw, scale):
    n, few = x.shape[-1], int(x.shape[-1] * scale)
    return through_pillow(x, lambda i: i.resize((few, few), Image.BOX).resize((n, n), Image.BOX))

@corruption((25, 18, 15, 10, 7), (65, 58, 50, 40, 25), (80, 65, 58, 50, 40))
def jpeg_compression(x, draw, quality):
    def encoded(image):
        image.save(file := io.BytesIO(), "JPEG", quality=quality)
        return Image.open(file)

    return through_pillow(x, encoded)

# The validation corruptions, for tuning: never in a mean over the fifteen above.

@corruption((.15, .2, .35, .45, .6), (.15, .2, .25, .3, .35), (.06, .1, .12, .16, .2))
def speckle_noise(x, draw, sigma):
    return x + x * sigma * draw(lambda g: torch.randn(x.shape[1:], generator=g))

@corruption((1, 2, 3, 4, 6), (.5, .75, 1, 1.25, 1.5), (.4, .6, .7, .8, 1))
def gaussian_blur(x, draw, sigma):
    return gaussian(x, sigma)

@corruption(((.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2)), ((.3, 0), (.1, 0), (2, 0), (5, .1),
            (30, .2)), ((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2)))
def saturate(x, draw, factor, shift):
    """HSV saturation s -> clip(s * factor + shift, 0, 1): channels move away from the value."""
    value = x.amax(1, keepdim=True)
    s = (value - x.amin(1, keepdim=True)) / value.clamp_min(1e-8)
    red = torch.tensor([0.0, 1, 1]).to(x)[:, None, None]  # grey has hue 0
    away = torch.where(s < 1e-8, red * value, (value - x) / s.clamp_min(1e-8))
    return value - away * (s * factor + shift).clamp(0, 1)

def corrupt(images, name, severity, indices, seed=0, frost=None):
    """images uint8 (B, 3, n, n) -> likewise, under CORRUPTIONS[name] at severity 1 to 5; `frost` is
    the folder of its photos. `indices` number the images: each has its own random generator, of
    (seed, index, name, severity), so that a result does not depend on its batch."""
    (function, by_size), key = CORRUPTIONS[name], list(CORRUPTIONS).index(name)
    values = by_size[min(by_size, key=lambda n: abs(n - images.shape[-1]))][severity - 1]
    values = values if isinstance(values, tuple) else (values,)
    seeds = [np.random.SeedSequence((seed, int(i), key, severity)) for i in indices]
    generators = [torch.Generator().manual_seed(int(s.generate_state(1)[0])) for s in seeds]

    def draw(sample, *columns):
        """(B, ...): sample(generator, row of each column), an image at a time."""
        return torch.stack([sample(*row) for row in zip(generators, *columns)]).to(images.device)

    x = function(images.float() / 255, draw, *values, *([frost] if name == "frost" else []))
    return (x.clamp(0, 1) * 255 + ROUNDING).byte()

# --- Data: folder kinds, and which outputs of a model their classes are ---------------------------

@dataclass
class Shift:
    """One test set: (path or (array file, row), label) of each image, and its class folders."""
    name: str
    samples: list
    classes: list
    corruption: str = ""    # "" where there is none
    severity: int = 0
    made: bool = False      # corrupted here, rather than published so
    clean: bool = False     # the models' own test set, no shift
    objectnet: dict = None  # ObjectNet: class folder -> outputs of an ImageNet model

class Pictures(Views):
    """Centre views at `size`, or at 224 px where they are to be corrupted here; small square images
    whole, at their own size; published corruptions as they are."""

    def __init__(self, sets, size, args):
        super().__init__(sets[0].samples, size, "centre", args)
        self.inside = slice(2, -2) if sets[0].objectnet else slice(None)  # its border; JPEG smears
        height, width = self.read(0)[0].shape[1:]
        if sets[0].corruption and not sets[0].made:
            self.centre = v2.Identity()
        elif height == width < 224:
            self.centre = v2.Compose([v2.Resize(width), v2.CenterCrop(width)])
        elif sets[0].made:
            self.centre = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])

    def read(self, index):
        path, label = self.samples[index]
        if isinstance(path, tuple):
            image = np.load(path[0], mmap_mode="r")[path[1]]
            return torch.tensor(image).permute(2, 0, 1), label, -1
        image, label, unreadable = super().read(index)
        return image[:, self.inside, self.inside], label, unreadable

def shifts(folder, corruptions, severities):
    """[[Shift]] of a folder by its layout, those together that share images; raises Refusal."""
    folder, name = Path(folder), Path(folder).name
    if (folder / "labels.npy").is_file():
        return arrays(folder, severities)
    published = sorted(d for depth in ("*", "*/*") for d in folder.glob(f"{depth}/[1-5]")
                       if any(d.glob("*/*")) and int(d.name) in severities)
    if published:
        return [[Shift(f"{name}/{d.parent.name}/{d.name}", *image_folder(d), d.parent.name,
                       int(d.name))] for d in published]
    folder = existing(folder, "val", "test")
    plain = objectnet(folder) if (folder / "mappings").is_dir() else \
        Shift(name, *image_folder(folder), clean=folder.name in ("val", "test"))
    made = [replace(plain, name=f"{name}/{c}/{s}", corruption=c, severity=s, made=True, clean=False)
            for c in corruptions for s in severities]
    return [[plain], made] if made else [[plain]]

def arrays(folder, severities):
    """As `shifts`, of a folder of .npy files in CIFAR-10-C's layout: five severities one after the
    other, the labels beside them. Raises Refusal."""
    files = sorted(file for file in folder.glob("*.npy") if file.stem != "labels")
    try:
        labels = np.load(folder / "labels.npy").tolist()
        lengths = {len(np.load(file, mmap_mode="r")) for file in files}
    except (ValueError, EOFError) as error:
        raise Refusal(f"{folder}: holds a broken .npy file; {error}") from error
    if lengths != {len(labels)}:
        raise Refusal(f"{folder}: needs arrays CORRUPTION.npy as long as labels.npy")
    n, classes = len(labels) // 5, [str(i) for i in range(max(labels) + 1)]
    samples = lambda file, s: [((str(file), i), labels[i]) for i in range(n * (s - 1), n * s)]
    return [[Shift(f"{folder.name}/{file.stem}/{s}", samples(file, s), classes, file.stem, s)]
            for file in files for s in severities]

def existing(folder, *names):
    """The first of folder/NAME that is a folder, else the folder itself."""
    return next((Path(folder, n) for n in names if Path(folder, n).is_dir()), Path(folder))

def objectnet(folder):
    """ObjectNet's images of the 113 classes that its own mappings share with ImageNet [2]; raises
    Refusal."""
    read = lambda name: json.loads((folder / "mappings" / f"{name}.json").read_text())
    try:
        labels, outputs = read("folder_to_objectnet_label"), {}
        order = sorted(labels.values())
        for output, index in read("imagenet_pytorch_id_to_objectnet_id").items():
            outputs.setdefault(order[index], []).append(int(output))
    except (ValueError, IndexError, AttributeError) as error:
        raise Refusal(f"{folder}/mappings: not ObjectNet's files; {error}") from error
    samples, classes = image_folder(existing(folder, "images"))
    shared = [c for c in classes if labels.get(c) in outputs]
    if not shared:
        raise Refusal(f"{folder}: none of its folders is a class that ImageNet has too")
    samples = [(path, shared.index(classes[k])) for path, k in samples if classes[k] in shared]
    return Shift(folder.name, samples, shared, objectnet={c: outputs[labels[c]] for c in shared})

def columns(shift, names, outputs, model):
    """Outputs of each class, (classes, m): ObjectNet's by its mapping; a numeric folder is the
    output itself; others stand among the class names `names`. Raises Refusal."""
    classes, numeric = shift.classes, lambda names: all(map(str.isdigit, names))
    if shift.objectnet and outputs == 1000:
        widest = max(map(len, shift.objectnet.values()))
        return [(shift.objectnet[c] * widest)[:widest] for c in classes]
    few = len(classes) < outputs and shift.corruption and not shift.made  # CIFAR-10-C, ImageNet's M
    if numeric(classes) and not (names and numeric(names)) and max(map(int, classes)) < outputs \
            and not few:
        return [[int(c)] for c in classes]
    if set(classes) <= set(names):
        return [[list(names).index(c)] for c in classes]
    raise Refusal(f"{shift.name} has {len(classes)} classes ({', '.join(classes[:3])} ...), "
                  f"{model} knows {outputs} ({', '.join((names or ['unnamed'])[:3])} ...)")

# --- Measuring ------------------------------------------------------------------------------------

def load_model(name, args):
    """A plug-in or network with .name, .heads and .zero_shot. A plain name's classifier is fitted
    (--probe), made from text, or comes with its weights. Raises Refusal."""
    ours = name.endswith(".pt") and ":" not in name
    saved = read_tensors(name, "network or plug-in") if ours else {}
    plug_in = saved.get("format") == "robustify plug-in"
    model = load(name) if plug_in else load_network(name, args.pretrained)
    model.name = column(name)
    model.to(args.device, memory_format=torch.channels_last).eval()
    if plug_in:
        model.zero_shot = model.config.zero_shot
    else:
        model.heads = {}
        if args.probe and not ours:
            samples, model.class_names = image_folder(existing(args.probe, "train"))
            features, labels = features_of(model, samples, args)
            model.classifier = best_probe(features["model"], labels, len(model.class_names))
        model.classes = 0 if model.classifier is None else len(model.classifier.weight)
        model.zero_shot = not model.classes and model.text_embeddings is not None
        if not (model.classes or model.zero_shot or args.transfer):
            raise Refusal(f"--model {name}: has no classifier; --probe DIR fits one on DIR/train")
    model.own = model.class_names or IMAGENET  # before it meets others
    return model

def column(name):
    """What a table calls the model of --model NAME."""
    return Path(name).name.removesuffix(".pt")

def meet(model, shift, args):
    """Set model.columns to the outputs of the shift's classes; a zero-shot model takes unknown ones
    as new class names, ImageNet's 1000 where they are some of those (Table 2). Raises Refusal."""
    classes, numbered = shift.classes, all(map(str.isdigit, shift.classes))
    if model.zero_shot and (numbered or not set(classes) <= set(model.class_names or [])):
        names = model.own if numbered else IMAGENET if shift.objectnet or \
            set(classes) <= set(IMAGENET) else classes
        templates = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
                     "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
        if names != model.class_names:
            name_classes(model, names, templates.get(args.templates, [args.templates]))
            model.to(args.device)
    names = model.class_names or (IMAGENET if model.classes == 1000 else [])
    model.columns = torch.tensor(columns(shift, names, model.classes, model.name),
                                 device=args.device)

def judge(model, pixels, labels):
    """{predictor: (B,) bool} of one batch; labels index model.columns. "X of all" decides among
    all outputs; "clean share" is where the clean head was chosen."""
    index, correct = model.columns, {}
    prediction = model.predict(pixels, with_original=True)
    for name, p in prediction.everyone.items():
        correct[name] = p[:, index].amax(-1).argmax(-1) == labels
        if index.numel() < model.classes:
            correct[f"{name} of all"] = (p.argmax(-1, keepdim=True) == index[labels]).any(-1)
    if len(model.heads) > 1:
        correct["oracle"] = correct["clean"] | correct["unclean"]
        correct["clean share"] = prediction.head == HEADS.index("clean")
    return correct

def images_of(sets, size, args):
    """(place in `sets`, uint8 images, labels, indices) by batches, of test sets that share their
    images: each is read once and corrupted here. Under torchrun each process gets its share."""
    views, n, seen = Pictures(sets, size, args), len(sets[0].samples), 0
    views.samples = views.samples[RANK::PROCESSES]
    with tqdm(desc=sets[0].name, total=n * len(sets), unit=" images", mininterval=2,
              disable=RANK > 0) as bar:
        for pixels, labels in measured(views, args):
            indices = range(RANK, n, PROCESSES)[seen:seen + len(labels)]
            clean, seen = (pixels * 255).round().byte(), seen + len(labels)
            for i, shift in enumerate(sets):
                images = clean if not shift.made else corrupt(
                    clean, shift.corruption, shift.severity, indices, args.seed, args.frost)
                if shift.made and args.jpeg and not args.corrupt_to:
                    images = (jpeg_compression(images / 255, None, 85) * 255).round().byte()
                yield i, images, labels, indices
                bar.update(len(labels) * PROCESSES)

def measure(models, folder, args):
    """-> ([(shift, {(model, predictor): (n,) bool, right or wrong})], whether Ctrl-C cut it short:
    then of shared images those that were done, of published sets those that were finished)."""
    found, cut, size = [], False, max(m.size for m in models)
    for sets in folder:
        rows = [{} for _ in sets]
        try:
            for model in models:
                meet(model, sets[0], args)
            for i, images, labels, indices in images_of(sets, size, args):
                for model in models:
                    for key, correct in judge(model, images / 255, labels).items():
                        rows[i].setdefault((model.name, key), np.full(
                            len(sets[i].samples), -1, np.int8))[indices] = correct.cpu()
        except KeyboardInterrupt:
            cut = True
        if PROCESSES > 1:
            every = [None] * PROCESSES
            torch.distributed.all_gather_object(every, rows)
            rows = [{key: np.max([row[key] for row in same if key in row], axis=0)
                     for key in same[0]} for same in zip(*every)]
        if all(len({model for model, _ in row}) == len(models) for row in rows):
            done = np.min([row[key] for row in rows for key in row], axis=0) >= 0
            if done.all() or len(sets) > 1 and done.any():
                found += [(shift, {key: correct[done] > 0 for key, correct in row.items()})
                          for shift, row in zip(sets, rows)]
        if cut:
            break
    return found, cut

def write_corrupted(sets, args):
    """Write what is corrupted here in ImageNet-C's layout: PNG, or (--jpeg) JPEG of quality 85."""
    for place, images, labels, indices in images_of(sets, 224, args):
        shift = sets[place]
        for image, label, i in zip(images.cpu(), labels, indices):
            file = Path(shift.samples[i][0]).stem + (".JPEG" if args.jpeg else ".png")
            path = Path(args.corrupt_to, shift.corruption, str(shift.severity),
                        shift.classes[label], file)
            path.parent.mkdir(parents=True, exist_ok=True)
            v2.functional.to_pil_image(image).save(path, quality=85)

# --- Tables ---------------------------------------------------------------------------------------

def table(header, rows):
    """Aligned Markdown in percent with one decimal; what passes 100 columns follows below."""
    cells = [[c if isinstance(c, str) else f"{100 * c:.1f}" for c in r] for r in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    fit = max(2, sum(np.cumsum(widths) + 3 * np.arange(1, len(widths) + 1) < 100))
    line = lambda row: "| " + " | ".join(
        c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row[:fit], widths))) + " |"
    rule = "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths[:fit]))
    text = "\n".join([line(cells[0]), f"|{rule}|", *map(line, cells[1:])])
    rest = [[row[0], *row[fit:]] for row in cells]
    return text if fit >= len(header) else f"{text}\n\n{table(rest[0], rest[1:])}"

def accuracies(found, keys):
    """(sets, keys), from 0 to 1."""
    return np.array([[row[key].mean() for key in keys] for _, row in found])

def averaged(found):
    """(sets,) bool, which enter the mean: the fifteen corruptions (fourteen without frost) where
    they are there, else all that are corrupted."""
    names = [shift.corruption for shift, _ in found]
    core = set(names) & set(ALEXNET)
    return np.isin(names, [*core] if len(core) > 13 else [*{*names} - {""}])

def summary(found, keys, clean=None):
    """[[label, a number for each key ...]], from 0 to 1: the clean set, each corruption over its
    severities, each severity over corruptions, the mean; mCE of all fifteen at all severities, and
    relative mCE where `clean`, the row of the clean set, is known."""
    accuracy, core = accuracies(found, keys), averaged(found)
    names, severities = np.array([(s.corruption, s.severity) for s, _ in found], object).T
    sets = {name or found[0][0].name: names == name for name in dict.fromkeys(names)}
    levels = {f"severity {s}": core & (severities == s) for s in sorted(set(severities[core]))}
    mean = {f"mean of {len(set(names[core]))} corruptions": core} if core.any() else {}
    chosen = sets | (levels if len(levels) > 1 else {}) | mean
    lines = {label: accuracy[mask].mean(0) for label, mask in chosen.items()}
    if mean and "clean share" not in [key for _, key in keys]:
        lines["mean error"] = 1 - accuracy[core].mean(0)
        if set(ALEXNET) <= set(names) and core.sum() == 75:
            errors = np.array([1 - lines[name] for name in ALEXNET])
            alexnet = np.array([*ALEXNET.values()])[:, None]
            lines["mCE"] = (errors / alexnet).mean(0)
            if clean:
                errors = errors - (1 - accuracies([(None, clean)], keys))
                lines["relative mCE"] = (errors / (alexnet - ALEXNET_CLEAN)).mean(0)
    lines = [[label, *values] for label, values in lines.items()]
    of_all = [(model, f"{key} of all") for model, key in keys]
    if not names[0] and set(of_all) <= set(found[0][1]):
        lines.insert(1, ["  of all", *accuracies(found[:1], of_all)[0]])
    return lines

def show(args, header, rows):
    """Print a table, and keep it for --json."""
    args.tables.append([header, *rows])
    print("\n" + table(header, rows))

def paired(differences):
    """Mean of differences (n,), one an image, from -1 to 1, with its standard error, in points."""
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return [f"{100 * differences.mean():+.1f}", f"{100 * error:.1f}"]

def compared(models):
    """{column: (model, predictor)}: each student once before tuning, then all models."""
    students = {(c.student, c.pretrained, c.zero_shot, c.data, c.limit): m
                for m in reversed(models) if m.heads for c in [m.config]}
    before = {"original" if len(students) == 1 else f"{m.name} original": (m.name, "original")
              for m in reversed(students.values())}
    return before | {m.name: (m.name, "selected" if m.heads else "model") for m in models}

def report(models, found, clean, cut, args):
    """Print the tables of one folder; `clean` is the row of its classes' clean set."""
    keys, core = compared(models), averaged(found)
    corrupted = [row for (_, row), enters in zip(found, core) if enters]
    counts = {len(correct) for row in corrupted or [found[0][1]] for correct in row.values()}
    title = f"accuracy, {max(counts)} images" + (" (partial)" if cut else "")
    show(args, [title, *keys], summary(found, keys.values(), clean))
    for m in (m for m in models if len(m.heads) > 1):
        every = ["original", *HEADS, "selected", "oracle", "clean share"]
        print(f"\n{m.name}: its heads, rule {m.config.rule}, K = {m.config.passes}", end="")
        show(args, ["accuracy", *every], summary(found, [(m.name, key) for key in every]))
        gain = lambda other: np.mean([row[m.name, "selected"] - row[other].astype(float)
                                      for row in corrupted], axis=0)
        if corrupted and len(counts) == 1:
            show(args, [f"on corruptions, {m.name} minus", "points", "paired standard error"],
                 [[name, *paired(gain(keys[name]))] for name in keys if name != m.name])

def average_of_shifts(models, everything, args):
    """Print Tables 1-3: each folder, a corrupted one by its mean, and the average over shifts."""
    keys, rows, counted = compared(models), [], []
    for found in everything:
        first, core, accuracy = found[0][0], averaged(found), accuracies(found, keys.values())
        name = first.name.split("/")[0]
        if not first.corruption:
            rows.append([name, *accuracy[0]])
            counted.append(not first.clean)
        if core.any():
            rows.append([name + "-C" * found[-1][0].made, *accuracy[core].mean(0)])
            counted.append(True)
    if sum(counted) > 1:
        average = np.mean([row[1:] for row, c in zip(rows, counted) if c], axis=0)
        rows += [[f"average of {sum(counted)} shifts", *average], ["error", *(1 - average)]]
        show(args, ["accuracy", *keys], rows)

def plot(file, models, everything, costs):
    """Accuracy and the share of the clean head against severity (Fig. 3), a line a model; with
    --cost also accuracy against the training cost of an image (Fig. 1)."""
    from matplotlib.figure import Figure
    labels = [("severity, 0 is clean", "accuracy (%)"), ("severity, 0 is clean", "clean head (%)"),
              ("training cost (ms an image)", "accuracy on corruptions (%)")][:2 + bool(costs)]
    figure = Figure(figsize=(5 * len(labels), 4), layout="tight")
    axes = figure.subplots(1, len(labels))
    for found in everything:
        severity, core = np.array([shift.severity for shift, _ in found]), averaged(found)
        where = f", {found[0][0].name.split('/')[0]}" if len(everything) > 1 else ""
        levels = sorted(set(severity[core | (severity == 0)]))
        sets = [(severity == level) & (core | (level == 0)) for level in levels]
        mean = lambda key, mask: 100 * accuracies(found, [key])[mask].mean()
        for name, key in compared(models).items():
            style, share = {"marker": "o", "label": name + where}, (key[0], "clean share")
            line, = axes[0].plot(levels, [mean(key, s) for s in sets], **style)
            style["color"] = line.get_color()
            if key[1] == "selected" and share in found[0][1]:
                axes[1].plot(levels, [mean(share, s) for s in sets], **style)
            if name in costs:
                axes[2].plot(costs[name], mean(key, core), linestyle="", **style)
    for axis, (x, y) in zip(axes, labels):
        axis.set(xlabel=x, ylabel=y)
        if axis.lines:
            axis.legend()
    figure.savefig(file)

# --- Transfer (Tables 1 and 3) --------------------------------------------------------------------

@torch.no_grad()
def features_of(model, samples, args):
    """({predictor: (n, D)}, labels (n,)): what a network's classifier sees; of a plug-in pooled
    activations after M_s, before and after tuning. Under torchrun each process takes all images."""
    pooled = lambda h: h[:, 0] if h.ndim == 3 else h.flatten(2).mean(-1)  # class token, or mean
    batches, keys = [], ("labels", "original", "tuned") if model.heads else ("labels", "model")
    views = Views(samples, model.size, "centre", args)
    for pixels, labels in measured(views, args, None if RANK else f"features of {model.name}"):
        if model.heads:
            z = model.backbone(pixels)
            batches.append((labels, pooled(model.original[0](z)), pooled(model.shared(z))))
        else:
            batches.append((labels, model.features(pixels)))
    features = dict(zip(keys, map(torch.cat, zip(*batches))))
    return features, features.pop("labels")

def best_probe(features, labels, classes):
    """A linear probe on standardised features, its weight decay chosen on a held-out tenth."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, rest = order.tensor_split([max(1, len(order) // 10)])
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)

    def fitted(rows, decay):
        probe = nn.Linear(features.shape[1], classes, device=features.device)
        for p in probe.parameters():
            nn.init.zeros_(p)  # a start that no random draw before it decides
        linear_probe((features[rows] - mean) / std, labels[rows], probe, decay)
        with torch.no_grad():  # so that it takes features as they are
            probe.weight /= std
            probe.bias -= probe.weight @ mean
        return probe

    score = lambda decay: right(fitted(rest, decay), features[held], labels[held]).mean()
    return fitted(order, max((0.1, 1e-2, 1e-3, 1e-4, 1e-5), key=score))

def right(probe, features, labels):
    """(n,) of 0 and 1: where the probe is right."""
    return (probe(features).argmax(-1) == labels).float().cpu().numpy()

@functools.cache
def transfer_sets(folder):
    """(train samples, test samples, classes) of a --transfer folder; raises Refusal."""
    (train, classes), (test, others) = (
        image_folder(part) for part in (Path(folder, "train"), existing(folder, "val", "test")))
    if classes != others:
        raise Refusal(f"--transfer {folder}: needs train/ and val/ with the same classes")
    return train, test, classes

def transfer(models, folder, args):
    """Linear probes fitted on folder/train and tested on val/ (or test/): prints accuracies, and of
    plug-ins the difference that tuning made."""
    (train, test, classes), rows = transfer_sets(folder), []
    for model in models:
        (known, y), (unseen, labels) = (features_of(model, part, args) for part in (train, test))
        correct = {key: right(best_probe(known[key], y, len(classes)), unseen[key], labels)
                   for key in known}
        rows += [[f"{model.name}, {key}", c.mean(), "", ""] for key, c in correct.items()]
        if model.heads:
            rows[-1][2:] = paired(correct["tuned"] - correct["original"])
    show(args, [f"linear probe, {Path(folder).name}", "accuracy", "tuned minus original",
                "paired standard error"], rows)

# --- Cost (latency columns) -----------------------------------------------------------------------

def timed(tasks, images):
    """{name: ms an image} of {name: function}: medians of five rounds in which all take turns, so
    that a slow moment of the machine strikes all alike."""
    seconds = {name: [] for name in tasks}
    for _ in range(6):  # the first warms up
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if images.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * np.median(s[1:]) / len(images) for name, s in seconds.items()}

def cost(model, args):
    """Print the costs of a plug-in's inference and training; returns {recipe: ms of training}."""
    n = min(args.batch_size, 64 if args.device == "cuda" else 4)
    pixels = torch.rand(n, 3, model.size, model.size, device=args.device)
    original = torch.no_grad()(lambda: model.original(model.backbone(pixels)))
    cost_of_inference(model, pixels, original, args)
    return cost_of_training(model, pixels, original, args)

def cost_of_inference(model, pixels, original, args):
    """Print GMACs, parameters and ms an image of the original and of the student for K passes."""
    def predict(passes, own=model.masks):
        model.masks = own.new_ones(passes, own.shape[1])
        model.predict(pixels)
        model.masks = own

    tasks = {"original": original} | {f"{model.name}, K = {k}": functools.partial(predict, k)
                                      for k in (1, 5, 10)}
    ms, rows, macs = timed(tasks, pixels), [], {}
    torch.backends.mha.set_fastpath_enabled(False)  # nor fused attention: it would not be counted
    for name, task in tasks.items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            task()
        macs[name] = counter.get_total_flops() / 2e9 / len(pixels)
        tuned = 0 if name == "original" else count(model.shared, model.heads)
        whole = count(model.backbone) + (tuned or count(model.original))
        rows.append([name, f"{macs[name]:.4g}", f"{macs[name] / macs['original']:.4f}",
                     f"{whole / 1e6:.2f}", f"{tuned / 1e6:.2f}", f"{ms[name]:.2f}",
                     f"{ms[name] / ms['original']:.3f}"])
    torch.backends.mha.set_fastpath_enabled(True)
    show(args, ["inference, an image", "GMACs", "ratio", "M parameters", "tuned", "ms", "ratio"],
         rows)

def cost_of_training(model, pixels, original, args):
    """Print ms an image of each recipe (forward and backward, half of the images clean)."""
    config, device = model.config, pixels.device
    labels = torch.zeros(len(pixels), dtype=torch.long, device=device)
    is_clean = torch.arange(len(pixels), device=device) % 2 == 0
    teacher = load_network(config.teacher).to(device).eval() if config.teacher else None
    half = torch.autocast("cuda", torch.bfloat16, enabled=pixels.is_cuda)

    def train(student):
        taught = teacher if len(student.heads) > 1 else None
        with half:
            loss = student_loss(student, taught, pixels, labels, is_clean)
        loss.backward()
        student.zero_grad()

    tasks = {"frozen forward pass": half(original)}
    for recipe in RECIPES if teacher else [config.recipe]:
        student = RobustStudent(model.backbone, *model.original, replace(config, recipe=recipe))
        tasks[recipe] = functools.partial(train, student.to(device).train())
    ms = timed(tasks, pixels)
    show(args, [f"training {model.name}'s student, an image", "ms", "ratio"], [
        [name, f"{ms[name]:.2f}", f"{ms[name] / ms['frozen forward pass']:.2f}"] for name in ms])
    return ms

def cost_of_corruptions(args):
    """Print ms an image of each of the fifteen (fourteen without frost) on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = (torch.rand(8, 3, 28, 28).repeat_interleave(8, 2).repeat_interleave(8, 3) * 255).byte()
    ms = timed({name: functools.partial(corrupt, images, name, 3, range(8), 0, args.frost)
                for name in ALEXNET if args.frost or name != "frost"}, images)
    torch.set_num_threads(threads)
    ms[f"all {len(ms)}"] = sum(ms.values())
    show(args, ["corruption, 224 px, severity 3", "ms an image"], [
        [name, f"{value:.2f}"] for name, value in ms.items()])

# --- main -----------------------------------------------------------------------------------------

def main(arguments=None):
    """The command line; returns the exit code."""
    try:
        return robustify.main(arguments, run)
    except KeyboardInterrupt:  # while nothing was measured yet
        return 130

def parse(arguments):
    """The settings: those of Config, and these. Raises Refusal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.set_defaults(**asdict(Config()))
    add = parser.add_argument
    add("--data", nargs="+", default=[], help="folders of test images")
    add("--model", nargs="+", default=["robust.pt"], help="plug-ins, networks, or names of these")
    add("--pretrained", help="for names, as in robustify.py")
    add("--probe", help="DIR: classifier of names by a linear probe, fitted on DIR/train")
    add("--templates", default="openai", help="of new class names: openai, simple, or text with {}")
    add("--corrupt", nargs="*", metavar="NAME", choices=CORRUPTIONS, help="corrupt the images too: "
        "the fifteen, or those named; for tuning speckle_noise gaussian_blur saturate")
    add("--severity", nargs="+", type=int, choices=range(1, 6), default=[1, 2, 3, 4, 5],
        dest="severities", metavar="1..5")
    add("--frost", help="folder of ImageNet-C's frost photos; without it fourteen corruptions")
    add("--jpeg", action="store_true", help="after corrupting, JPEG of quality 85 as published")
    add("--corrupt-to", help="write the corrupted images into this folder, and measure nothing")
    add("--transfer", nargs="+", default=[], help="folders with train/ and val/ for linear probes")
    add("--cost", action="store_true", help="GMACs, parameters, milliseconds")
    add("--plot", help="picture of accuracy against severity (needs matplotlib)")
    add("--json", help="write everything that was measured to this file")
    add("--batch-size", type=int)
    add("--workers", type=int)
    add("--seed", type=int)
    add("--device", choices=("cuda", "cpu"))
    args = parser.parse_args(arguments)
    if not arguments:
        args.data, args.model = ["demo/val"], [f"demo/{n}.pt" for n in ("teacher", "apt", "ours")]
        args.corrupt, args.severities = DEMO, [3, 5]
        if not Path("demo/ours.pt").is_file():
            raise Refusal("demo/ours.pt: no such file; make it with: python robustify.py")
    if args.corrupt == [] or args.corrupt_to and not args.corrupt:
        args.corrupt = [c for c in ALEXNET if args.frost or c != "frost"]
    return args

def check(args):
    """Raises Refusal where the settings cannot be."""
    for wrong, message in (
            (args.batch_size < 1 or min(args.workers, args.seed) < 0,
             "--batch-size: from 1; --workers and --seed: from 0"),
            (not args.frost and "frost" in (args.corrupt or []), "--corrupt frost: needs --frost"),
            (not all(Path(file).parent.is_dir() for file in (args.json, args.plot) if file),
             "--json and --plot: make the folder of the file first"),
            (not re.fullmatch(r"openai|simple|[^{}]*{}[^{}]*", args.templates),
             "--templates: openai, simple, or a string with {} for the class name"),
            (len(set(map(column, args.model))) < len(args.model),
             "--model: two files have the same name; the tables could not tell them apart"),
            (args.plot and Path(args.plot).suffix not in (".png", ".pdf", ".svg"),
             "--plot: a file that ends in .png, .pdf or .svg"),
            (args.plot and not importlib.util.find_spec("matplotlib"),
             "--plot: needs matplotlib; pip install matplotlib"),
            (not (args.data or args.transfer or args.cost),
             "give --data, --transfer or --cost, or no argument for the demo's results")):
        if wrong:
            raise Refusal(message)

def run(arguments):
    """Parse, measure, print; raises Refusal. What can be refused is, before anything is built."""
    args = parse(arguments)
    check(args)
    args.tables = []
    folders = [shifts(folder, args.corrupt or [], args.severities) for folder in args.data]
    for folder in args.transfer:
        transfer_sets(folder)
    if args.probe:
        image_folder(existing(args.probe, "train"))
    if args.frost:
        frost_photos(args.frost, 1)
    if args.corrupt_to:
        write_folders(folders, args)
        return
    join_processes(args.device)
    with redirect_stdout(None if RANK else sys.stdout):  # one process prints
        evaluate(folders, args)

def write_folders(folders, args):
    """Do what --corrupt-to asks for."""
    for folder in folders:
        if not folder[-1][-1].made:
            raise Refusal(f"--corrupt-to: {folder[0][0].name} is corrupted already")
    for folder in folders:
        describe(folder, args)
        write_corrupted(folder[-1], args)

def describe(folder, args):
    """Print what is to be measured: the counts of a folder, and where its corruptions come from."""
    first, made = folder[0][0], folder[-1][-1].made
    how = ", corrupted here" + ", JPEG 85" * args.jpeg if made else ""
    print(f"{first.name}: {len(first.samples)} images, {len(first.classes)} classes, "
          f"{sum(map(len, folder))} sets{how}", flush=True)
    if made and set(args.corrupt) == set(ALEXNET) - {"frost"}:
        print("no frost photos (see --frost): fourteen corruptions, no mCE")

def evaluate(folders, args):
    """Measure and print what the command line asks for."""
    models = [load_model(name, args) for name in args.model]
    for folder in folders:
        first = folder[0][0]  # clean is what a model was made for: new classes are a shift, Table 2
        first.clean &= any(set(first.classes) <= set(model.own) for model in models)
        for model in (m for m in models if not m.zero_shot):
            meet(model, first, args)
    everything, cut, costs = [], False, {}
    try:
        for model in models if args.cost else []:
            if model.heads:
                costs[model.name] = cost(model, args)[model.config.recipe]
        if args.cost:
            cost_of_corruptions(args)
        cut = measure_folders(models, folders, everything, args)
        average_of_shifts(models, everything, args)
        for folder in [] if cut else args.transfer:
            transfer(models, folder, args)
    except KeyboardInterrupt:
        cut = True
    if cut:
        print("\nstopped by Ctrl-C: partial, the tables hold what was finished")
    if args.json and not RANK:
        write_json(models, everything, args, cut)
    if args.plot and not RANK and any(averaged(found).any() for found in everything):
        plot(args.plot, models, everything, costs)
    if args.data == ["demo/val"]:
        print("\nWhat to see: the teacher breaks least under corruption; ours carries some of that "
              "into the student,\nand chooses the clean head more often where images are clean.")
    if cut:
        sys.exit(130)

def measure_folders(models, folders, everything, args):
    """Measure and report folder by folder, clean ones first; extends `everything` by what is found
    and returns whether Ctrl-C cut it short."""
    clean = {}
    for folder in sorted(folders, key=lambda folder: not folder[0][0].clean):
        describe(folder, args)
        found, cut = measure(models, folder, args)
        if found:
            everything.append(found)
            (first, row), classes = found[0], tuple(found[0][0].classes)
            if first.clean:
                clean[classes] = row
            report(models, found, clean.get(classes) if first.corruption else row, cut, args)
        if cut:
            return True
    return False

def write_json(models, everything, args, cut):
    """Write everything that was measured to --json, with what is needed to repeat it."""
    sets = []
    for shift, row in sum(everything, []):
        accuracy = {m.name: {} for m in models}
        for (model, predictor), correct in row.items():
            accuracy[model][predictor] = float(correct.mean())
        sets.append({"name": shift.name, "n": len(correct), "of": len(shift.samples), "classes":
                     len(shift.classes), "corrupted_here": shift.made, "accuracy": accuracy})
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, open_clip, timm)}
    transform = "published corruptions and square images below 224 px: as they are; corrupted " \
        "here: Resize 256, CenterCrop 224; else for the largest model's size, Resize 256/224 of " \
        "it (above 64 px), CenterCrop; then each model resizes to its own"
    training = set(asdict(Config())) - {"data", "pretrained", "batch_size", "workers", "seed"}
    own = {k: v for k, v in vars(args).items() if k not in training | {"tables"} or k == "device"}
    Path(args.json).write_text(json.dumps(
        {"sets": sets, "tables": args.tables, "partial": cut, "seed": args.seed, "arguments": own,
         "models": {m.name: {"size": m.size} | (asdict(m.config) if m.heads else {})
                    for m in models}, "transform": transform,
         "versions": {"python": sys.version.split()[0], **versions}}, indent=1, default=float))

if __name__ == "__main__":
    sys.exit(main())
