"""The card of a model: what it is, what it was trained on and how, and how to load it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.join import Joined

if TYPE_CHECKING:
    from recipes.clip.train import Training


def of(training: Training, joined: Joined, sample: int) -> str:
    """README.md of a model folder."""
    made_of = json.loads(joined.of)["version"]
    phases = "\n".join(
        f"| {p.px} | {p.steps * p.batch:,} | {p.batch:,} | {p.lr * p.batch / 256:.3g} |"
        for p in training.phases
    )
    mix = training.mix
    weights = ", ".join(f"{name} {weight:g}" for name, weight in mix.captions.items())
    how = "the original and a caption, concatenated" if mix.concat else "one of them"
    part = ", of a caption one random sentence" if mix.one_sentence else ""
    towers = training.towers
    begun = Path(training.start).name if training.start else "nothing"
    total = training.first(len(training.phases))
    state = "the end" if sample == total else f"sample {sample:,} of {total:,}: not the end"
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- clip
- recapkit
---
# {training.name}

A CLIP, ViT-{towers.vision}/{towers.patch} with a text tower of size {towers.text}, trained from \
{begun} on {made_of["name"]} {made_of["version"]} with recapkit, up to {state}.

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```

## Training

{joined.audit}.

A sample's text is the original with p = {mix.p_original:g}, else {how} ({weights}){part}; the loss is \
{"CLIP's" if training.loss == "clip" else "SigLIP's"}\
{f", with {training.captioning:g} times that of captions" if training.captioning else ""}.

| px | samples | batch | peak learning rate |
| --- | --- | --- | --- |
{phases}

All settings:

```json
{json.dumps(_settings(training), indent=1)}
```
"""


def _settings(training: Training) -> dict[str, Any]:
    """Without the places of this machine: a card is read elsewhere."""
    found = asdict(training)
    for name in ("version", "images", "subset", "start"):
        if found[name] and "://" not in found[name]:
            found[name] = Path(found[name]).name
    found["towers"]["tokenizer"] = Path(found["towers"]["tokenizer"]).name
    return found
