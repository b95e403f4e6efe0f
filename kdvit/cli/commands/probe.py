"""`kdvit probe`: what the features of networks tell of classes, side by side."""

from __future__ import annotations

import json
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from kdvit.cli.commands.analyze import Processes
from kdvit.cli.config_files import require_configs, require_writable
from kdvit.errors import shown
from kdvit.tables import text_table


def probe(
    networks: list[str],
    *,
    data: str,
    k: PositiveInt = 20,
    c: PositiveFloat = 1.0,
    layer: int | float | str | None = None,
    pretrained: bool = True,
    out: str | None = None,
    batch_size: PositiveInt = 64,
    num_workers: NonNegativeInt = 2,
    trainer: Processes = Processes(),  # noqa: B008
) -> None:
    """Show how well the frozen features of networks tell classes apart: by k-NN and a linear probe.

    Both learn from the training images, not augmented, and are scored on the validation images, which each network gets
    in its own size and normalisation. k-NN is DINO's: neighbours by the cosine vote by exp(cosine / 0.07). The linear
    probe is logistic regression on standardised features, fitted to its end.

    Args:
        networks: Names of timm, exported folders, checkpoints, or configs (student, trained if its run is there, and
            teacher of each).
        data: Folder of labelled images as ImageFolder reads it, or FashionMNIST or Digits.
        k: Neighbours that vote.
        c: Inverse strength of the linear probe's penalty, as C of scikit-learn's LogisticRegression.
        layer: Index, fraction of the depth or name, whose mean token is the feature; by default pooled, what the head
            reads, or of a network without it the last.
        pretrained: Published weights for names of timm; else random ones.
        out: A JSON file for the numbers.
        batch_size: Images at once.
        num_workers: Processes that load images.
        trainer: How to run.

    Examples:
        kdvit probe runs/demo/lift/student --data Digits
    """
    require_configs(networks)
    require_writable(out)
    from lightning.pytorch import seed_everything

    from kdvit.analysis.probes import ProbeOptions
    from kdvit.analysis.probing import probe as probed
    from kdvit.cli.analyses import process_trainer
    from kdvit.cli.lookup import find_networks
    from kdvit.data.labelled import labelled_images

    seed_everything(0, verbose=False)
    options = ProbeOptions(k, c=c, layer=layer)
    runner = process_trainer(trainer)
    results = []
    for name in networks:
        for label, network in find_networks(name, pretrained=pretrained, trained=True):
            with shown((ValueError, TypeError, OSError, ImportError), prefix=f"{label}: "):
                images = labelled_images(data, network.image_format, batch_size=batch_size, num_workers=num_workers)
                results.append({"name": label, **probed(network, images, options, runner)._asdict()})
    if not runner.is_global_zero:
        return
    print(f"{results[0]['train']:,} images to learn from, {results[0]['val']:,} held out, of {data}.")
    rows = [(r["name"], f"{r['width']}", f"{r['knn']:.2%}", f"{r['linear']:.2%}") for r in results]
    print(text_table(("network", "width", f"{k}-NN top-1", "linear top-1"), rows))
    if out:
        Path(out).write_text(json.dumps({"data": data, "k": k, "c": c, "networks": results}, indent=1) + "\n")
