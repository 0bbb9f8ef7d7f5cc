"""Measure networks and robustify.py's plug-ins under distribution shift (Secs. 3 and 5).

    python eval.py                                                # what the demo left in demo/
    python eval.py --data imagenet-c/                             # --model robust.pt
    python eval.py --data imagenet/ imagenetv2/ imagenet-r/ imagenet-c/ --model apt.pt robust.pt
    python eval.py --data objectnet/ --corrupt --frost frost/     # ObjectNet-C, made in memory
    python eval.py --data imagenet-c/ --model ft.pt --alpha 0 .25 .5 .75 1             # WiSE-FT
    python eval.py --data imagenet-c/ --model resnet50 ViT-B-32 --plot severity.png    # Sec. 3
    python eval.py --transfer flowers/ --cost                     # linear probes; GMACs, ms

A plug-in is what robustify.py tuned of a network, the original is that network before. APT tunes
the same part under one head, without teachers. Of three heads Eq. 6 selects, image by image, the
clean or the unclean one, whichever has the smaller product of uncertainty and divergence from the
combined head. The oracle is right wherever either of the two is.

    layout of a folder          what it is
    CORRUPTION/SEVERITY/CLASS/  published corruptions: all, in groups, one, or one severity
    images/, mappings/          ObjectNet: the classes that ImageNet has too, without the red border
    CLASS/, or in val/, test/   images; --corrupt corrupts them here

    its classes             model of ImageNet      model of other names   zero-shot model
    wnids (n01440764)       by wnid                by name, or refused    ImageNet's 1000
    numbers (ImageNetV2)    number -> wnid         by name, or as wnid    0 to 999: ImageNet's 1000
    ObjectNet's             mappings -> wnid       mappings -> wnid       ImageNet's 1000
    other names             refused                by name, or refused    as new words

Outputs without names are taken in the order of the folders. A folder with fewer classes than the
model is decided among them. A model sees the central 224/256 of the short side at its own size;
corruptions are made at 224 px. Squares of at most 64 px are seen whole and corrupted at 64 px;
published corruptions that are square are seen as they are.

[2] Barbu et al.: ObjectNet. [11] Hendrycks, Dietterich: ImageNet-C and its mCE.
"""

import argparse
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm

import robustify
from robustify import (CHOICES, DEVICE, HEADS, RECIPES, ImageClasses, Refusal, autocast, cut,
                       centre_view, fingerprint, load_network, read_file, read_image, set_classes)

embed_text = functools.cache(robustify.embed_text)  # a thousand classes take a minute
IMAGENET = timm.data.ImageNetInfo().label_names()  # wnids, in the order of the outputs
PREDICTORS = [f"{head} head" for head in HEADS] + ["selected", "oracle", "clean head chosen"]
DEMO = """--data demo/val --model demo/teacher.pt demo/apt.pt demo/three-heads.pt --severity 3 5
    --corrupt speckle_noise gaussian_blur saturate impulse_noise defocus_blur jpeg_compression"""

# --- One batch is judged, one folder is measured --------------------------------------------------

@dataclass
class Column:
    """A model, and the column that it fills in the tables."""
    name: str
    model: torch.nn.Module
    classes: list              # names of its outputs, None where they are unknown
    group: str = ""            # plug-ins and originals of one group share M_b
    original: object = None    # of a plug-in, the Column of what it was tuned from
    is_original: bool = False  # measured once for all plug-ins that were tuned from it
    outputs: torch.Tensor = None  # (classes of the folder at hand, m): the outputs that mean each

@dataclass
class Cell:
    """The images of a folder under one corruption at one severity, or under none."""
    folder: str                # the name of its --data
    classes: list              # its class folders; a label is the place of one
    samples: list              # (path, label)
    corruption: str = ""
    severity: int = 0
    published: bool = False    # corrupted already
    wnids: dict = None         # ObjectNet: class folder -> classes of ImageNet
    right: dict = field(default_factory=dict)  # (column, predictor) -> (n,) bool, when measured

@torch.no_grad()
def judge(columns, views, labels, average):
    """One batch through all models: views {input size, or 0 for any: uint8 (B, 3, n, n)}, labels
    (B,) -> {(column, predictor): (B,) bool}, right or wrong. A predictor is what a model says, its
    "prediction", or one of PREDICTORS; "of all" decides among all outputs of a model."""
    right = {}
    opinions = []
    shared = {}  # what M_b gives, once for all that share it
    for column in columns:
        name = column.name
        model = column.model
        pixels = views.get(model.size, views.get(0)) / 255
        found = {}
        with autocast():
            if column.group and column.group not in shared:
                shared[column.group] = model.backbone(pixels)
            if column.original:
                prediction = model.predict_from(shared[column.group])
                found["prediction"] = prediction.probabilities
                for head, phi in prediction.phi.items():
                    found[f"{head} head"] = phi
            elif column.is_original:
                logits = model.original_top(shared[column.group].clone())
                found["prediction"] = logits.float().softmax(-1)
            else:
                found["prediction"] = model(pixels).float().softmax(-1)
        for predictor, p in found.items():
            of_class = p[:, column.outputs].amax(-1)  # the best of the outputs that mean it
            right[name, predictor] = of_class.argmax(-1) == labels
            if predictor == "prediction":
                best = p.argmax(-1, keepdim=True)
                right[name, "of all"] = (column.outputs[labels] == best).any(-1)
                if not column.is_original:
                    opinions.append(of_class / of_class.sum(-1, keepdim=True).clamp_min(1e-30))
        if "clean head" in found:
            right[name, "selected"] = right[name, "prediction"]
            right[name, "oracle"] = right[name, "clean head"] | right[name, "unclean head"]
            right[name, "clean head chosen"] = prediction.head == HEADS.index("clean")
    if average:  # of the probabilities among the folder's classes
        right["average", "prediction"] = torch.stack(opinions).mean(0).argmax(-1) == labels
    return right

def measure(folder, columns, args):
    """Fills in and yields the cells of a folder; those corrupted here together, image by image."""
    for column in columns:
        set_outputs(column, folder[0], args)
    together = [[cell] for cell in folder] if folder[0].published else [folder]
    for cells in together:
        found = {}
        n = len(cells[0].samples)
        for views, labels, places, numbers in batches(cells, columns, args):
            for key, right in judge(columns, views, labels, args.average).items():
                rows = found.setdefault(key, np.zeros((len(cells), n), bool))
                rows[places, numbers] = right.cpu()
        for place, cell in enumerate(cells):
            cell.right = {key: rows[place] for key, rows in found.items()}
            yield cell

@dataclass
class Views(Dataset):
    """index -> (views {size: uint8 (3, n, n)}, label, place of the cell, number of the image): all
    cells of an image, then of the next. A view of size 0 is for models of any input size."""
    cells: list
    sizes: set
    args: argparse.Namespace
    last: tuple = (None, None)  # path, image: a worker reads an image once for all cells

    def __len__(self):
        return len(self.cells) * len(self.cells[0].samples)

    def __getitem__(self, index):
        number, place = divmod(index, len(self.cells))
        cell = self.cells[place]
        path, label = cell.samples[number]
        if self.last[0] != path:
            self.last = (path, read_image(path))
        image = self.last[1]
        if cell.wnids and min(image.shape[1:]) > 4:
            image = image[:, 2:-2, 2:-2]  # ObjectNet's red border of 1 px, smeared by JPEG
        is_square = image.shape[1] == image.shape[2]
        if cell.published and is_square:
            views = {0: image}
        elif cell.corruption and not cell.published:
            image = centre_view(image, 64 if is_square and image.shape[1] <= 64 else 224)
            views = {0: corrupt(image, cell.corruption, cell.severity, number, self.args.seed,
                                self.args.frost)}
        else:
            views = {size: centre_view(image, size) for size in self.sizes}
        return views, label, place, number

def stack(items):
    """Items of a Views as batches, one for each shape: clean and corrupted images are mixed."""
    alike = {}
    for item in items:
        shapes = [(size, view.shape) for size, view in item[0].items()]
        alike.setdefault(str(shapes), []).append(item)
    return [default_collate(some) for some in alike.values()]

def batches(cells, columns, args):
    """Yields (views {size: (B, 3, n, n)}, labels, places, numbers) of all images in the cells."""
    views = Views(cells, {column.model.size for column in columns}, args)
    loader = DataLoader(views, args.batch_size, num_workers=args.workers, collate_fn=stack,
                        pin_memory=DEVICE == "cuda")
    with tqdm(desc=cells[0].folder, total=len(views), unit=" images", leave=False) as bar:
        for batch, labels, places, numbers in itertools.chain.from_iterable(loader):
            batch = {size: view.to(DEVICE) for size, view in batch.items()}
            yield batch, labels.to(DEVICE), places, numbers
            bar.update(len(labels))

# --- Folder kinds ---------------------------------------------------------------------------------

def read_folder(path, name, args):
    """The cells of one --data, its kind recognised by its layout; raises Refusal."""
    path = Path(path).resolve()
    folder = published_cells(path, name, args)
    if folder and args.corrupt:
        raise Refusal(f"--corrupt: {path} is corrupted already; give it a run of its own")
    if (path / "mappings").is_dir():
        folder = [objectnet(path, name)]
    elif not folder:
        images = ImageClasses(part_of(path, "val", "test"))
        folder = [Cell(name, images.classes, images.samples)]
    for cell in folder:
        if args.limit:
            cell.samples = robustify.balanced(cell.samples, args.limit, args.seed)
    for corruption, severity in itertools.product(args.corrupt, args.severity):
        folder.append(replace(folder[0], corruption=corruption, severity=severity, right={}))
    return folder

def part_of(path, *names):
    """The first of path/NAME that is a folder, else the path itself."""
    for name in names:
        if Path(path, name).is_dir():
            return Path(path, name)
    return Path(path)

def published_cells(path, name, args):
    """Cells of ImageNet-C's layout, or of a part of it; what they lack is printed."""
    folders = []
    for depth in ("", "*/", "*/*/"):
        folders += sorted(path.glob(f"{depth}[1-5]"))
    if path.name in list("12345") and path.parent.name in CORRUPTIONS:
        folders = [path]
    found = {}
    for folder in folders:
        key = (folder.parent.name, int(folder.name))
        if any(folder.glob("[!.]*/[!.]*")) and key[1] in args.severity:  # else it is a class
            if key in found:
                raise Refusal(f"{path}: {found[key].root} and {folder} are the same corruption")
            found[key] = ImageClasses(folder)
    classes = sorted({label for images in found.values() for label in images.classes})
    most = max(map(len, found.values()), default=0)
    cells = []
    for corruption in dict.fromkeys(corruption for corruption, _ in found):
        for severity in sorted({severity for _, severity in found}):
            images = found.get((corruption, severity), [])
            if len(images) < most or len(images.classes) < len(classes):
                print(f"{name}: {corruption} {severity} has {len(images)} images, others {most}")
            if images:
                samples = [(file, classes.index(images.classes[k])) for file, k in images.samples]
                cells.append(Cell(name, classes, samples, corruption, severity, published=True))
    return cells

def objectnet(path, name):
    """Cell of ObjectNet: those of its classes that ImageNet has too. Its own mappings [2] give each
    folder a label, and outputs of ImageNet networks the place of a label in the alphabet."""
    label_of = json.loads((path / "mappings/folder_to_objectnet_label.json").read_text())
    place_of = json.loads((path / "mappings/imagenet_pytorch_id_to_objectnet_id.json").read_text())
    labels = sorted(label_of.values())
    wnids = {}
    for output, place in place_of.items():
        wnids.setdefault(labels[place], []).append(IMAGENET[int(output)])
    images = ImageClasses(path / "images")
    shared = {}
    samples = []
    for file, label in images.samples:
        folder = images.classes[label]
        if label_of.get(folder) in wnids:
            shared[folder] = wnids[label_of[folder]]
            samples.append((file, list(shared).index(folder)))
    return Cell(name, list(shared), samples, wnids=shared)

# --- Class mapping: which outputs of a model mean a class of the folder ---------------------------

def set_outputs(column, cell, args):
    """Set the outputs that mean the folder's classes, by the table above. Raises Refusal."""
    classes = cell.classes
    model = column.model
    is_zero_shot = model.text is not None
    names = column.classes or []
    if not names and not is_zero_shot:
        names = [str(output) for output in range(model.classes)]
        if len(classes) == len(names) and set(classes) != set(names):
            names = classes
            print(f"{column.name} names no classes: taken for {', '.join(names[:3])} ...")
    wanted = cell.wnids or {name: [name] for name in classes}
    numbers = {str(output): [wnid] for output, wnid in enumerate(IMAGENET)}
    if set(classes) <= set(numbers) and not set(classes) <= set(names):
        if len(classes) == 1000 or not is_zero_shot:  # fewer numbers may mean anything
            wanted = {name: numbers[name] for name in classes}
    every = list(itertools.chain.from_iterable(wanted.values()))
    if is_zero_shot:
        if not set(every) <= set(names):
            names = IMAGENET if set(every) <= set(IMAGENET) else every
        if args.templates or names != model.class_names:
            templates = args.templates or open_clip.OPENAI_IMAGENET_TEMPLATES
            set_classes(model, names, *embed_text(model.text, tuple(names), tuple(templates)))
    unknown = [name for name in every if name not in names]
    if unknown:
        raise Refusal(f"{cell.folder}: {len(unknown)} of its {len(classes)} classes, such as "
                      f"{unknown[0]}, are unknown to {column.name} ({', '.join(names[:3])} ...)")
    widest = max(map(len, wanted.values()))
    rows = []
    for name in classes:
        outputs = [names.index(each) for each in wanted[name]]
        rows.append((outputs * widest)[:widest])  # repeats do not change the maximum
    column.outputs = torch.tensor(rows, device=DEVICE)

# --- Models ---------------------------------------------------------------------------------------

def load_columns(args):
    """The columns of --model, each original before its plug-ins. Raises Refusal."""
    columns = []
    known = {}  # backbones and originals, each kept once
    for path, name in zip(args.model, short_names("--model", args.model)):
        if is_plug_in(path):
            columns += plug_ins(path, name, known, args)
            continue
        network = load_network(path, args.image_size).to(DEVICE)
        if network.classifier is not None:
            network.classes = len(network.classifier.weight)
        elif network.text is None:
            raise Refusal(f"--model {path}: has no classifier; --recipe lp fits one")
        columns.append(Column(name, network, network.class_names))
    originals = [column for column in columns if column.is_original]
    if len(originals) == 1:
        originals[0].name = "original"
    if (args.alpha or args.rule or args.passes or args.cost) and not known:
        raise Refusal("--alpha, --rule, --passes, --cost: for plug-ins, and none is among --model")
    if args.templates and all(column.model.text is None for column in columns):
        raise Refusal("--templates: none of --model takes class names as text")
    if args.image_size and all(path.endswith(".pt") for path in args.model):
        raise Refusal("--image-size: for networks by name; a file of ours has its own")
    return columns

def plug_ins(path, name, known, args):
    """Yields the columns of a plug-in: one, or one for each --alpha, --rule and --passes."""
    for alpha, rule, passes in itertools.product(
            args.alpha or [1.0], args.rule or [""], args.passes or [0]):
        student = robustify.load(path, alpha=alpha).to(DEVICE)
        config = student.config
        if len(student.heads) == 1 and (rule or passes):
            raise Refusal(f"--rule, --passes: {path} has one head; nothing is selected")
        label = name
        if args.alpha:
            label += f" alpha {alpha:g}"
        if rule:
            label += f" {rule}"
            config.rule = rule
        if passes:
            label += f" K {passes}"
            config.passes = passes
            student.masks = robustify.dropout_masks(config, student.masks.shape[1]).to(DEVICE)
        network = f"{config.student} {student.size}"
        group = f"{network} {len(student.backbone)} {fingerprint(student.backbone)}"
        student.backbone = known.setdefault(group, student.backbone)
        whole = f"{network} {student.fingerprint}"
        if whole not in known:
            known[whole] = Column(f"original of {name}", student, student.class_names, group,
                                  is_original=True)
            yield known[whole]
        yield Column(label, student, student.class_names, group, known[whole])

def is_plug_in(path):
    """Whether it is a file of robustify.py with a tuned part; not a whole network, nor a name."""
    return path.endswith(".pt") and Path(path).is_file() and read_file(path)["kind"] == "plug-in"

def short_names(flag, paths):
    """The shortest ends of the paths that tell them apart; raises Refusal where none does."""
    parts = [Path(path).absolute().parts for path in paths]
    for suffix, length in itertools.product((".pt", ""), range(1, 100)):
        names = ["/".join(part[-length:]).removesuffix(suffix) for part in parts]
        if len(set(names)) == len(names) and not {"average", "original"} & set(names):
            return names
    raise Refusal(f"{flag}: two of {', '.join(paths)} are the same")

# --- Metrics and tables ---------------------------------------------------------------------------

def mean_over(cells, values):
    """The mean of values, numbers or (n,), one a cell: over severities, then over corruptions."""
    of_corruption = {}
    for cell, value in zip(cells, values):
        of_corruption.setdefault(cell.corruption, []).append(value)
    return np.mean([np.mean(of, axis=0) for of in of_corruption.values()], axis=0)

def accuracy(cells, key):
    """From 0 to 1; NaN where a model has no such predictor."""
    return mean_over(cells, [np.mean(cell.right.get(key, np.nan)) for cell in cells])

def in_mean(folder):
    """The corrupted cells that count: not those for tuning, where the fifteen are there too."""
    fifteen = [cell for cell in folder if cell.corruption in ALEXNET]
    if len({cell.corruption for cell in fifteen}) >= 14:
        return fifteen
    return [cell for cell in folder if cell.corruption]

def summary(folder, keys):
    """Rows [label, accuracy for each key]: clean images, corruptions, severities, their mean."""
    groups = {}
    for cell in folder:
        groups.setdefault(cell.corruption or "clean images", []).append(cell)
    corrupted = in_mean(folder)
    for severity in sorted({cell.severity for cell in corrupted}):
        groups[f"severity {severity}"] = [c for c in corrupted if c.severity == severity]
    if corrupted:
        where = "as published" if corrupted[0].published else "here"
        groups[f"corrupted {where}, mean of {len({c.corruption for c in corrupted})}"] = corrupted
    return [[label] + [accuracy(cells, key) for key in keys] for label, cells in groups.items()]

def paired(cells, one, other):
    """Accuracy of one column minus another's, image by image, in points, +- 2 standard errors."""
    if len({len(cell.samples) for cell in cells}) != 1:
        return "-"  # no cells, or cells of different images
    differences = [cell.right[one, "prediction"].astype(float) - cell.right[other, "prediction"]
                   for cell in cells]
    return with_error(mean_over(cells, differences))

def with_error(difference):
    """The mean of differences (n,), one an image, in points, +- 2 standard errors."""
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return f"{100 * difference.mean():+.1f} +- {200 * error:.1f}"

def show(header, rows):
    """Print a table in Markdown, numbers from 0 to 1 in percent."""
    lines = [header]
    for row in rows:
        cells = [cell if isinstance(cell, str) else f"{100 * cell:.1f}" for cell in row]
        lines.append([cell.replace("nan", "-") for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    print()
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        cells[0] = line[0].ljust(widths[0])
        print("| " + " | ".join(cells) + " |", flush=True)

def write(folders, args):
    """--json, replaced as a whole: a run that ends early leaves what it has measured."""
    cells = []
    for cell in itertools.chain.from_iterable(folders):
        found = {f"{name}: {key}": float(row.mean()) for (name, key), row in cell.right.items()}
        cells.append({"folder": cell.folder, "corruption": cell.corruption,
                      "severity": cell.severity, "images": len(cell.samples), "accuracy": found})
    part = Path(f"{args.json}.part")
    part.write_text(json.dumps({"arguments": vars(args), "cells": cells}, indent=1))
    part.replace(args.json)

def report(folder, columns, names, args):
    """Print the tables of a folder that was measured."""
    title = folder[0].folder
    clean = [cell for cell in folder if not cell.corruption]
    corrupted = in_mean(folder)
    keys = [(name, "prediction") for name in names]
    rows = summary(folder, keys)
    if corrupted:
        rows.append(["mean error"] + [1 - value for value in rows[-1][1:]])
    sizes = {(len(cell.samples), len({label for _, label in cell.samples})) for cell in corrupted}
    is_imagenet = set(folder[0].classes) == set(IMAGENET)
    if is_imagenet and len(corrupted) == 75 and len(sizes) == 1 and not args.limit:
        rows.append(["mCE"])
        for key in keys:
            ratios = [(1 - cell.right[key].mean()) / ALEXNET[cell.corruption] for cell in corrupted]
            rows[-1].append(mean_over(corrupted, ratios))
    if any(len(folder[0].classes) < column.model.classes for column in columns):
        of_all = [accuracy(clean or corrupted, (name, "of all")) for name in names]
        rows.append(["of all outputs"] + of_all)
    show([f"{title}: accuracy (%)"] + names, rows)
    for column in columns:
        if (column.name, "oracle") in folder[0].right:
            keys = [(column.original.name, "prediction")]
            keys += [(column.name, predictor) for predictor in PREDICTORS]
            show([column.name, "original"] + PREDICTORS, summary(folder, keys))
    pairs = [(column.name, column.original.name) for column in columns if column.original]
    models = [column.name for column in columns if not column.is_original] + names[len(columns):]
    pairs += [(name, models[0]) for name in models[1:]]
    if pairs:
        rows = [[f"{one} minus {other}", paired(clean, one, other), paired(corrupted, one, other)]
                for one, other in dict.fromkeys(pairs)]
        show([f"{title}: points, +- 2 paired standard errors", "clean images", "corrupted"], rows)

def average_of_shifts(folders, names):
    """Print "Avg. shifts" of Tables 1 to 3: over all folders but the first."""
    rows = []
    shifts = []
    for folder in folders:
        for row in summary(folder, [(name, "prediction") for name in names]):
            if row[0].startswith(("clean images", "corrupted")):
                rows.append([f"{folder[0].folder}, {row[0]}"] + row[1:])
                if folder is not folders[0]:
                    shifts.append(row[1:])
    rows.append([f"average of all but {folders[0][0].folder}"] + list(np.mean(shifts, axis=0)))
    show(["accuracy (%)"] + names, rows)

def plot(folders, names, path):
    """Accuracy, and the share of the clean head, against severity (Figure 3); 0 is uncorrupted."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(15, max(5, len(names) * len(folders) / 4)), layout="constrained")
    axes = figure.subplots(1, 2)
    labels = ["clean images"] + [f"severity {severity}" for severity in range(1, 6)]
    titles = {"prediction": "accuracy (%)", "clean head chosen": "clean head chosen (%)"}
    for axis, (predictor, title) in zip(axes, titles.items()):
        axis.set(xlabel="severity, 0 is uncorrupted", ylabel=title, xticks=range(6))
        for folder, style in zip(folders, itertools.cycle(("-", "--", ":", "-."))):
            rows = summary(folder, [(name, predictor) for name in names])
            values = {row[0]: 100 * np.array(row[1:]) for row in rows}
            severities = [severity for severity in range(6) if labels[severity] in values]
            axis.set_prop_cycle(None)  # a colour is a model, a style a folder
            axis.plot(severities, [values[labels[severity]] for severity in severities], style,
                      marker="o", label=[f"{name}, {folder[0].folder}" for name in names])
    figure.legend(handles=axes[0].get_lines(), loc="outside right upper")
    figure.savefig(path)

# --- Transfer (Tables 1 and 3): linear probes -----------------------------------------------------

@torch.no_grad()
def features_of(images, column, args):
    """(features (n, 1 or 2, D), labels (n,)): what the original's and the tuned classifier see."""
    model = column.model
    found = []
    every = []
    for views, labels, _, _ in batches([Cell("", images.classes, images.samples)], [column], args):
        pixels = views[model.size] / 255
        with autocast():
            if not column.group:
                places = [model.features(pixels)]
            else:
                z = model.backbone(pixels)
                shared, head = model.original_top
                places = [head[:-1](shared(z.clone())),
                          model.heads["combined"].body(model.shared(z.clone()))]
        found.append(torch.stack(places, 1).float())
        every.append(labels)
    return torch.cat(found), torch.cat(every)

def transfer(path, columns, args):
    """Print the accuracy of linear probes fitted to train/ and tested on val/ or test/."""
    train = ImageClasses(Path(path, "train"))
    test = ImageClasses(part_of(path, "val", "test"))
    if train.classes != test.classes:
        raise Refusal(f"--transfer {path}: needs train/ and val/ with the same classes")
    rows = []
    for column in [column for column in columns if not column.is_original]:
        known, labels = features_of(train, column, args)
        unseen, truth = features_of(test, column, args)
        mean = known.mean(0)
        std = known.std(0).clamp_min(1e-6)
        right = []
        for place, x in enumerate(((known - mean) / std).unbind(1)):
            probe = torch.nn.Linear(x.shape[1], len(train.classes), device=DEVICE)
            robustify.linear_probe(x, labels, probe)
            found = probe(((unseen - mean) / std)[:, place]).argmax(-1)
            right.append((found == truth).float().cpu().numpy())
        rows.append([f"{column.name}, original", right[0].mean(), "-"])
        if column.group:
            rows.append([f"{column.name}, tuned", right[1].mean(), with_error(right[1] - right[0])])
    show([f"linear probe, {path}", "accuracy (%)", "minus original"], rows)

# --- Cost -----------------------------------------------------------------------------------------

def cost(path):
    """Print GMACs and milliseconds of inference and training, over the library's forward pass."""
    saved = read_file(path)
    config = robustify.Config(**saved["config"])
    network = robustify.load_original(path, saved).to(DEVICE)
    teacher = None
    if config.teacher:
        teacher = robustify.load_teacher(config, network.class_names).to(DEVICE)
    number = torch.arange(64 if DEVICE == "cuda" else 4, device=DEVICE)
    pixels = torch.rand(len(number), 3, network.size, network.size, device=DEVICE)
    rows = []

    def infer(model):
        with torch.no_grad(), autocast():
            model(pixels)

    def train(student):
        with autocast():
            loss = robustify.student_loss(student.train(), teacher, pixels, 0 * number,
                                          number % 2 == 0)
        loss.backward()
        student.zero_grad()

    def add(name, task):
        gmacs = count_macs(task)
        ms, library_ms = milliseconds([task, library])
        rows.append([name, f"{gmacs / len(pixels):.4g}", f"{gmacs / library_gmacs:.3f}",
                     f"{ms / len(pixels):.4g}", f"{ms / library_ms:.3f}"])

    library = functools.partial(infer, network)
    library_gmacs = count_macs(library)
    add("library's forward pass", library)
    for recipe, row in RECIPES.items():
        network.requires_grad_(True)
        try:
            student = cut(network, replace(config, recipe=recipe)).to(DEVICE)
        except Refusal as reason:
            print(reason)  # prompts are for ViTs
            continue
        if recipe in ("apt", "three-heads"):
            add(f"inference, {recipe}", functools.partial(infer, student))
        lacks_teacher = "robust" in (row.clean_teacher, row.augmented_teacher) and teacher is None
        if any(p.requires_grad for p in student.parameters()) and not lacks_teacher:
            add(f"training step, {recipe}", functools.partial(train, student))
    show([f"{config.student}, an image", "GMACs", "/ library", "ms", "/ library"], rows)

def milliseconds(tasks):
    """Of each task, the median of five rounds in which they take turns."""
    seconds = np.zeros((6, len(tasks)))
    for turn, place in np.ndindex(seconds.shape):
        start = time.perf_counter()
        tasks[place]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds[turn, place] = time.perf_counter() - start
    return 1000 * np.median(seconds[1:], axis=0)  # the first round warms up

def count_macs(task):
    """Multiply-accumulates of task(), in 1e9; fused attention would hide from the counter."""
    formulas = {torch.ops.aten.convolution_backward: flops_of_convolution_backward}
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with sdpa_kernel(SDPBackend.MATH), counter:
        task()
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() / 2e9

def flops_of_convolution_backward(grad, x, weight, *settings, out_shape):
    """Of each wanted gradient; torch's own formula takes grouped convolutions for dense ones."""
    wants_x, wants_weight, _ = settings[-1]
    return 2 * math.prod(grad) * math.prod(weight[1:]) * (wants_x + wants_weight)

# --- The corruptions of ImageNet-C [11] as a library ----------------------------------------------
# Each takes one image x (3, n, n) in [0, 1] and the parameters of a severity, lengths in pixels.

def levels(x):
    """The grey levels 0 to 255 of x: cut off, not rounded, as published."""
    return (x.clamp(0, 1) * 255 + 1e-4).floor()  # float32 may leave a whole number a little short

def gaussian_noise(x, sigma):
    """Add normal noise of standard deviation sigma."""
    return x + sigma * torch.randn_like(x)

def shot_noise(x, photons):
    """Count photons, of which a white pixel receives `photons` on average."""
    return torch.poisson(x * photons) / photons

def impulse_noise(x, amount):
    """Turn the share `amount` of all values into salt (1) or pepper (0)."""
    chance = torch.rand_like(x)
    salted = torch.where(chance < amount, 1, x)
    return torch.where(chance < amount / 2, 0, salted)

def speckle_noise(x, sigma):
    """Add normal noise of standard deviation sigma times the value."""
    return x + x * sigma * torch.randn_like(x)

def gaussian_weights(offsets, sigma):
    """A Gaussian at integer offsets from its peak, with sum 1."""
    return torch.softmax(-offsets**2 / (2 * sigma**2), 0)

def defocus_blur(x, radius, alias):
    """Blur by a disk of `radius` px, its rim smoothed by a Gaussian of `alias` px."""
    width = int(max(8, radius))
    line = torch.arange(-width, width + 1.0)
    disk = (line[:, None]**2 + line**2 <= radius**2).float()
    reach = 1 + int(radius > 8)
    weights = gaussian_weights(torch.arange(-reach, reach + 1), alias)
    disk = F.pad((disk / disk.sum())[None], (reach,) * 4, mode="reflect")
    kernel = F.conv2d(disk, torch.outer(weights, weights)[None, None])
    return F.conv2d(F.pad(x, (width,) * 4, mode="reflect"), kernel.expand(3, 1, -1, -1), groups=3)

def gaussian_blur(x, sigma, truncate=4, mode="edge"):
    """Blur by a Gaussian of sigma px, cut at truncate * sigma; `mode` names np.pad's borders."""
    n = x.shape[-1]
    radius = int(truncate * sigma + 0.5)
    weights = gaussian_weights(torch.arange(-radius, radius + 1), sigma)
    # Row i of the matrix says how much of each pixel goes into pixel i: faster than to convolve.
    padded = torch.from_numpy(np.pad(np.arange(n), radius, mode))
    sources = padded.unfold(0, 2 * radius + 1, 1)
    matrix = torch.zeros(n, n).scatter_add_(1, sources, weights.expand(n, -1))
    return matrix @ x @ matrix.T

def glass_blur(x, sigma, shift, rounds):
    """Blur by sigma px, let pixels copy others up to `shift` px away for `rounds`, blur again."""
    n = x.shape[-1]
    x = levels(gaussian_blur(x, sigma)) / 255
    pixel = torch.arange(n * n)
    nearest = torch.minimum(pixel // n, pixel % n)
    farthest = torch.maximum(pixel // n, pixel % n)
    inner = (nearest > shift) & (farthest <= n - shift)
    for _ in range(int(rounds)):
        down, right = torch.randint(-int(shift), int(shift), (2, n * n))
        target = torch.where(inner, pixel + n * down + right, pixel)
        # As published, a round runs from the last pixel to the first, in place: a target further on
        # is a copy already. Each look at where a look leads follows such a chain twice as far.
        end = torch.where(inner[target] & (target > pixel), target, pixel)
        while not torch.equal(end, end[end]):
            end = end[end]
        x = x.flatten(1)[:, target[end]].view_as(x)
    return gaussian_blur(x, sigma)

def motion_blur(x, radius, sigma, low=-45, high=45):
    """Smear by half a Gaussian of sigma px, 2 * radius + 1 long, at `low` to `high` degrees."""
    n = x.shape[-1]
    taps = int(2 * radius + 1)
    angle = math.radians(torch.empty(()).uniform_(low, high))
    weights = gaussian_weights(torch.arange(taps), sigma)
    padded = F.pad(x, (taps,) * 4, mode="replicate")
    smeared = torch.zeros_like(x)
    for tap, weight in enumerate(weights):
        # ImageMagick reads whole pixels along the line, halves rounded down.
        top = taps + math.ceil(tap * math.sin(angle) - 0.5)
        left = taps + math.ceil(tap * math.cos(angle) - 0.5)
        smeared += weight * padded[:, top:top + n, left:left + n]
    return levels(smeared) / 255  # ImageMagick returns 8 bits: snow is lighter without this

def zoomed(x, factor):
    """The centre of x, magnified by `factor` to the size of x (scipy's zoom of order 1, cut)."""
    n = x.shape[-1]
    crop = math.ceil(n / factor)
    top = (n - crop) // 2
    size = round(crop * factor)
    x = x[None, :, top:top + crop, top:top + crop]
    x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=True)[0]
    trim = (size - n) // 2
    return x[:, trim:trim + n, trim:trim + n]

def zoom_blur(x, stop, step):
    """Average x with its centre magnified by 1, 1 + step, ... up to `stop`."""
    factors = np.arange(1, stop, step)  # its float rounding decides on the last, as published
    total = x.clone()
    for factor in factors:
        total += zoomed(x, factor)
    return total / (len(factors) + 1)

def snow(x, mean, std, zoom, threshold, radius, sigma, mix):
    """Whiten the image and let flakes fall: noise over `threshold`, magnified and smeared."""
    flakes = zoomed(mean + std * torch.randn_like(x[:1]), zoom)
    flakes = levels(torch.where(flakes < threshold, 0, flakes)) / 255
    flakes = motion_blur(flakes, radius, sigma, low=-135, high=-45)
    grey = v2.functional.rgb_to_grayscale(x)
    x = mix * x + (1 - mix) * torch.maximum(x, 1.5 * grey + 0.5)
    return x + flakes + flakes.rot90(2, (1, 2))

@functools.cache
def frost_photo(path, n):
    """A photo (3, H, W) in [0, 1], at the scale that suits images of n px."""
    photo = read_image(path)[None] / 255
    scale = max(np.interp(n, (64, 224), (0.3, 1)), n / min(photo.shape[2:]))  # to cover an image
    size = [round(side * scale) for side in photo.shape[2:]]
    return F.interpolate(photo, size=size, mode="bilinear")[0]

def frost(x, image_weight, texture_weight, folder):
    """Mix in a piece of one of five photos in `folder`; as published, the sixth is never drawn."""
    n = x.shape[-1]
    files = sorted(Path(folder).glob("frost[1-5].*"))
    photo = frost_photo(files[int(torch.randint(5, ()))], n)
    top = int(torch.randint(max(photo.shape[1] - n, 1), ()))
    left = int(torch.randint(max(photo.shape[2] - n, 1), ()))
    return image_weight * x + texture_weight * photo[:, top:top + n, left:left + n]

def jittered(total, amplitude):
    """The mean of four neighbours, given their sum, and a random step."""
    step = torch.empty_like(total).uniform_(-amplitude, amplitude)
    return total / 4 + amplitude * step  # the amplitude enters twice, as published

def plasma(n, decay):
    """Clouds (n, n) in [0, 1]: a diamond-square fractal, rougher with less `decay`."""
    size = 1 << (n - 1).bit_length()
    cloud = torch.zeros(size, size)
    step = size
    amplitude = 100.0
    while step >= 2:
        half = step // 2
        corners = cloud[::step, ::step]
        pairs = corners + corners.roll(-1, 0)
        centres = jittered(pairs + pairs.roll(-1, 1), amplitude)
        above = centres + centres.roll(1, 0) + corners + corners.roll(-1, 1)
        beside = centres + centres.roll(1, 1) + pairs
        cloud[half::step, half::step] = centres
        cloud[::step, half::step] = jittered(above, amplitude)
        cloud[half::step, ::step] = jittered(beside, amplitude)
        step = half
        amplitude = amplitude / decay
    cloud = cloud - cloud.min()
    return (cloud / cloud.max())[:n, :n]

def fog(x, amount, decay):
    """Add `amount` times a cloud, then darken until no value is above the largest of before."""
    peak = x.max()
    return (x + amount * plasma(x.shape[-1], decay)) * peak / (peak + amount)

def brightness(x, amount):
    """Raise the HSV value, the largest channel, by `amount`; hue and saturation stay."""
    value = x.amax(0, keepdim=True)
    colour = torch.where(value > 0, x / value.clamp_min(1e-8), 1)
    return colour * (value + amount).clamp_max(1)

def saturate(x, factor, shift):
    """Set HSV saturation s to s * factor + shift; hue and value stay."""
    value = x.amax(0, keepdim=True)
    saturation = (value - x.amin(0, keepdim=True)) / value.clamp_min(1e-8)
    # How far each channel lies below the value at full saturation. Grey has hue 0, red.
    below_red = torch.tensor([0.0, 1.0, 1.0])[:, None, None] * value
    below = (value - x) / saturation.clamp_min(1e-8)
    below = torch.where(saturation < 1e-8, below_red, below)
    return value - below * (saturation * factor + shift).clamp(0, 1)

def contrast(x, factor):
    """Scale the distance from the mean of each channel by `factor`."""
    mean = x.mean((1, 2), keepdim=True)
    return (x - mean) * factor + mean

def elastic_transform(x, alpha, sigma, affine):
    """Move three points by up to `affine` px, then each pixel by alpha times smoothed noise."""
    n = x.shape[-1]
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    points = signs * (n // 3) + n // 2
    moved = points + torch.empty(3, 2).uniform_(-affine, affine)
    back = torch.linalg.solve(F.pad(moved, (0, 1), value=1), points)
    line = torch.arange(n)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).float()
    source = F.pad(grid, (0, 1), value=1) @ back
    # Borders mirror about the centre of the last pixel here, and about its outer edge below.
    source = 2 * source / (n - 1) - 1
    x = F.grid_sample(x[None], source[None], padding_mode="reflection", align_corners=True)
    if alpha == 0:
        return x[0]
    noise = torch.empty(2, n, n).uniform_(-1, 1)
    noise = gaussian_blur(noise, sigma, truncate=3, mode="symmetric")
    source = (2 * (grid + alpha * noise.permute(1, 2, 0)) + 1) / n - 1
    return F.grid_sample(x, source[None], padding_mode="reflection", align_corners=False)[0]

def pixelate(x, scale):
    """Shrink to `scale` times the size and enlarge again, by Pillow's box filter."""
    n = x.shape[-1]
    few = int(n * scale)
    image = v2.functional.to_pil_image((x * 255).round().byte())
    image = image.resize((few, few), Image.BOX).resize((n, n), Image.BOX)
    return v2.functional.pil_to_tensor(image) / 255

def jpeg_compression(x, quality):
    """Encode as JPEG of this quality and decode again."""
    file = io.BytesIO()
    v2.functional.to_pil_image((x * 255).round().byte()).save(file, "JPEG", quality=int(quality))
    return v2.functional.pil_to_tensor(Image.open(file)) / 255

TABLE = (  # function, AlexNet's error [11], parameters at severity 1 to 5 for 224 px, for 64 px
    (gaussian_noise, .886428, ".08 .12 .18 .26 .38", ".04 .08 .12 .15 .18"),
    (shot_noise, .894468, "60 25 12 5 3", "250 100 50 30 15"),
    (impulse_noise, .922640, ".03 .06 .09 .17 .27", ".01 .02 .05 .08 .14"),
    (defocus_blur, .819880, "3,.1 4,.5 6,.5 8,.5 10,.5", ".5,.6 1,.1 1.5,.1 2.5,.01 3,.1"),
    (glass_blur, .826268, ".7,1,2 .9,2,1 1,2,3 1.1,3,2 1.5,4,2",
     ".1,1,1 .5,1,1 .6,1,2 .7,2,1 .9,2,2"),
    (motion_blur, .785948, "10,3 15,5 15,8 15,12 20,15", "10,1 10,1.5 10,2 10,2.5 12,3"),
    (zoom_blur, .798360, "1.11,.01 1.16,.01 1.21,.02 1.26,.02 1.31,.03",
     "1.06,.01 1.11,.01 1.16,.01 1.21,.01 1.26,.01"),
    (snow, .866816,
     ".1,.3,3,.5,10,4,.8 .2,.3,2,.5,12,4,.7 .55,.3,4,.9,12,8,.7 "
     ".55,.3,4.5,.85,12,8,.65 .55,.3,2.5,.85,12,12,.55",
     ".1,.2,1,.6,8,3,.8 .1,.2,1,.5,10,4,.8 .15,.3,1.75,.55,10,4,.7 "
     ".25,.3,2.25,.6,12,6,.65 .3,.3,1.25,.65,14,12,.6"),
    (frost, .826572, "1,.4 .8,.6 .7,.7 .65,.7 .6,.75", "1,.3 .9,.4 .8,.45 .75,.5 .7,.55"),
    (fog, .819324, "1.5,2 2,2 2.5,1.7 2.5,1.5 3,1.4", ".4,3 .7,3 1,2.5 1.5,2 2,1.75"),
    (brightness, .564592, ".1 .2 .3 .4 .5", ".1 .2 .3 .4 .5"),
    (contrast, .853204, ".4 .3 .2 .1 .05", ".4 .3 .2 .1 .05"),
    (elastic_transform, .646056,
     "488,170.8,24.4 488,19.52,48.8 12.2,2.44,4.88 17.08,2.44,4.88 29.28,2.44,4.88",
     "0,0,5.12 3.2,19.2,3.84 6.4,5.12,3.84 6.4,1.92,1.92 10.24,1.92,1.28"),
    (pixelate, .717840, ".6 .5 .4 .3 .25", ".9 .8 .7 .6 .5"),
    (jpeg_compression, .606500, "25 18 15 10 7", "65 58 50 40 25"),
    (speckle_noise, None, ".15 .2 .35 .45 .6", ".15 .2 .25 .3 .35"),  # from here on: for tuning
    (gaussian_blur, None, "1 2 3 4 6", ".5 .75 1 1.25 1.5"),
    (saturate, None, ".3,0 .1,0 2,0 5,.1 20,.2", ".3,0 .1,0 2,0 5,.1 30,.2"))
CORRUPTIONS = {row[0].__name__: row for row in TABLE}
ALEXNET = {name: row[1] for name, row in CORRUPTIONS.items() if row[1]}

def corrupt(image, name, severity, index=0, seed=0, frost=None):
    """Corrupt an image (3, n, n) of uint8 by name, at severity 1 to 5; `frost` is the folder of
    photos. What is random follows from seed, index, name and severity alone."""
    function, _, at_224_px, at_64_px = CORRUPTIONS[name]
    rows = at_64_px if image.shape[-1] < 144 else at_224_px
    values = [float(value) for value in rows.split()[severity - 1].split(",")]
    if name == "frost":
        values.append(frost)
    robustify.set_seed(seed, index, list(CORRUPTIONS).index(name), severity)
    return levels(function(image / 255, *values)).byte()

# --- main -----------------------------------------------------------------------------------------

def parse(arguments):
    """The settings; raises Refusal."""
    parser = argparse.ArgumentParser(
        usage="eval.py [--data FOLDER ...] [--model FILE.pt or NAME ...] [--FLAG VALUE ...]",
        epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = robustify.refuse
    add = parser.add_argument
    add("--data", nargs="+", default=[], help="folders; averages are over all but the first")
    add("--model", nargs="+", default=["robust.pt"], help="plug-ins, networks, or names of these")
    add("--templates", nargs="+", default=[], help="of zero-shot models: texts with {} for a class")
    add("--alpha", nargs="+", default=[], type=float, help="mix plug-ins, 1, with the original, 0")
    add("--rule", nargs="+", default=[], choices=CHOICES["rule"], help="kl-u is Eq. 6")
    add("--passes", nargs="+", default=[], type=int, help="K of MC dropout")
    add("--average", action="store_true", help="measure the mean of all models' probabilities too")
    add("--corrupt", nargs="*", metavar="NAME", choices=CORRUPTIONS, help="the fifteen of "
        "ImageNet-C, or those named; for tuning speckle_noise, gaussian_blur, saturate")
    add("--severity", nargs="+", type=int, choices=range(1, 6), default=[1, 2, 3, 4, 5])
    add("--frost", help="folder of ImageNet-C's frost photos; without it fourteen corruptions")
    add("--transfer", nargs="+", default=[], help="folders with train/ and val/, for linear probes")
    add("--cost", action="store_true", help="GMACs and milliseconds of inference and training")
    add("--plot", help="picture of accuracy against severity; needs matplotlib")
    add("--json", help="file for all that was measured")
    add("--batch-size", type=int, default=256)
    add("--workers", type=int, default=min(8, os.cpu_count()), help="processes that read images")
    add("--seed", type=int, default=0, help="of corruptions made here, and of --limit")
    add("--limit", type=int, default=0, help="images of each folder, balanced over classes; 0: all")
    add("--image-size", type=int, default=0, help="input size of networks by name; 0: their own")
    args = parser.parse_args(arguments or DEMO.split())
    if not arguments and not Path("demo").is_dir():
        raise Refusal("demo/: no such folder; make it with: python robustify.py")
    if args.corrupt == []:
        args.corrupt = [name for name in ALEXNET if args.frost or name != "frost"]
        if not args.frost:
            print("fourteen of the fifteen corruptions; frost, and with it mCE, needs --frost")
    args.corrupt = list(dict.fromkeys(args.corrupt or []))
    args.severity = sorted(set(args.severity))
    return args

def check(args):
    """Raises Refusal where the settings cannot be."""
    if not (args.data or args.transfer or args.cost) or robustify.PROCESSES > 1:
        raise Refusal("give --data, --transfer or --cost, or nothing for the demo; in one process")
    for template in args.templates:
        if [template.count(part) for part in ("{}", "{", "}")] != [1, 1, 1]:
            raise Refusal(f"--templates {template}: needs one {{}} for the class")
    photos = list(Path(args.frost or "no folder").glob("frost[1-5].*"))
    if bool(args.frost) != ("frost" in args.corrupt) or (args.frost and len(photos) != 5):
        raise Refusal("--corrupt frost: goes with --frost, a folder of the photos frost1 to frost5")
    inputs = {Path(folder).resolve() for folder in args.data + args.transfer}
    for file, ending in ((args.json, ".json"), (args.plot, ".png")):
        path = Path(file or f"any{ending}").resolve()
        can_be_written = os.access(path.parent, os.W_OK) and not path.is_dir()
        if path.suffix != ending or not can_be_written or inputs & set(path.parents):
            raise Refusal(f"{file}: must be a writable file *{ending}, in no input folder")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise Refusal("--plot: needs matplotlib; pip install matplotlib")

def run(arguments):
    """Parse, measure, print. Raises Refusal; what can be refused is, before an image is read."""
    args = parse(arguments)
    check(args)
    names = short_names("--data", args.data)
    folders = [read_folder(path, name, args) for path, name in zip(args.data, names)]
    columns = load_columns(args)
    for folder, column in itertools.product(folders, columns):
        set_outputs(column, folder[0], args)
    names = [column.name for column in columns] + ["average"] * args.average
    if folders:
        images = sum(len(cell.samples) for folder in folders for cell in folder)
        print(f"models x images: {len(names)} x {images:,}", flush=True)
    for path in args.model:
        if args.cost and is_plug_in(path):
            cost(path)
    for path in args.transfer:
        transfer(path, columns, args)
    for folder in folders:
        for _ in measure(folder, columns, args):
            if args.json:
                write(folders, args)
        report(folder, columns, names, args)
    if len(folders) > 1:
        average_of_shifts(folders, names)
    if args.plot:
        plot(folders, names, args.plot)

if __name__ == "__main__":
    raise SystemExit(robustify.main(run))
