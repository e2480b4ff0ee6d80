"""Train the embedded family again: ``python -m mergetool.lab.training``. Arguments: ``[STAGE...] [--folder DIR]``.

    vae       the picture encoder and decoder                    (1,500 steps)
    base      from nothing, with the text encoder                (3,000 steps)
    turbo     base with new refiners, distilled to four steps    (1,200 steps)
    deturbo   turbo, trained on without distillation             (500 steps)
    striped   base, fine-tuned on striped grounds                (350 steps)
    hollow    turbo, fine-tuned on hollow shapes                 (700 steps)
    alkahest  base and deturbo merged 1:1, refiners frozen       (800 steps)

Without a STAGE all are trained, in this order. Each stage starts from members already in the folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImagePipeline
from torch import Tensor

from mergetool.lab.training import distil, flow, models
from mergetool.lab.training import vae as vae_training
from mergetool.models import EMBEDDED

GUIDANCE = 3.0
DATA = 6000
SHIFTS = {"base": 6.0, "striped": 6.0, "alkahest": 3.0, "turbo": 3.0, "deturbo": 3.0, "hollow": 3.0}


class Stages:
    """The stages of training, each a method, over one folder of members."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[list[float]] = []

    def load(self, name: str) -> ZImagePipeline:
        """A member, in float32."""
        return ZImagePipeline.from_pretrained(self.folder / name, dtype=torch.float32)

    def save(self, name: str, pipeline: ZImagePipeline) -> None:
        pipeline.register_modules(scheduler=models.scheduler(SHIFTS[name]))
        models.save(self.folder / name, pipeline)

    def report(self, step: int, loss: float, seconds: float) -> None:
        self.losses.append([step, round(loss, 5)])
        print(f"  step {step:5}  loss {loss:.4f}  {seconds:6.0f} s  {seconds / step:.2f} s a step", flush=True)

    @contextmanager
    def recorded(self, name: str, **settings: object) -> Iterator[dict[str, object]]:
        """Time a stage and write its record to the folder."""
        print(name, settings, flush=True)
        self.losses, begin = [], time.monotonic()
        entry: dict[str, object] = dict(settings)
        yield entry
        entry |= {
            "loss": self.losses,
            "seconds": round(time.monotonic() - begin),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
        }
        path = self.folder / "record.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(record | {name: entry}, indent=1) + "\n")
        print(name, {key: value for key, value in entry.items() if key != "loss"}, flush=True)

    # ---- stages

    def vae(self) -> None:
        steps, seed = 1500, 1
        kinds: tuple[dict[str, bool], ...] = (
            {},
            {"striped": True},
            {"hollow": True},
            {"striped": True, "hollow": True},
        )
        drawn = [flow.PictureSet.draw(DATA // 4, seed + i, **kind) for i, kind in enumerate(kinds)]
        pixels = torch.cat([torch.from_numpy(part.pixels) for part in drawn]).numpy()
        pictures = flow.PictureSet(pixels, [prompt for part in drawn for prompt in part.prompts])
        with self.recorded("vae", steps=steps, seed=seed):
            vae = vae_training.train(pictures, steps=steps, seed=seed, report=self.report)
        vae.to(torch.bfloat16).save_pretrained(self.folder / "vae")

    def base(self) -> None:
        steps, seed = 3000, 2
        torch.manual_seed(seed)
        vae = AutoencoderKL.from_pretrained(self.folder / "vae", dtype=torch.float32)
        tokenizer = models.tokenizer(self.folder / "tokenizer")
        pipeline = ZImagePipeline(
            scheduler=models.scheduler(SHIFTS["base"]),
            vae=vae,
            text_encoder=models.text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=models.transformer(),
        )
        trained = (pipeline.transformer, pipeline.text_encoder)
        with self.recorded("base", steps=steps, seed=seed) as entry:
            self._flow(pipeline, trained, steps=steps, rate=2.5e-3, seed=seed)
            entry |= flow.adherence(pipeline, steps=30, shift=6.0, guidance=GUIDANCE)
        self.save("base", pipeline)

    def turbo(self) -> None:
        steps, seed, count = 1200, 3, 3072
        pipeline = self.load("base")
        with self.recorded("turbo", steps=steps, seed=seed, paths=count) as entry:
            paths, sigmas, texts = distil.record(pipeline, count, guidance=GUIDANCE, seed=seed)
            torch.manual_seed(seed)
            distil.reset_refiners(pipeline.transformer, models.transformer())
            generator = torch.Generator().manual_seed(seed)
            student = pipeline.transformer.train()
            flow.train(
                list(student.parameters()),
                lambda: distil.loss(student, paths, sigmas, texts, generator),
                steps=steps,
                rate=1e-3,
                averaged=[student],
                report=self.report,
            )
            entry |= flow.adherence(pipeline, steps=4, shift=3.0, guidance=0.0)
        self.save("turbo", pipeline)

    def deturbo(self) -> None:
        self._tune("deturbo", "turbo", steps=500, rate=5e-4, seed=4)

    def striped(self) -> None:
        self._tune("striped", "base", steps=350, rate=4e-4, seed=5, striped=True)

    def hollow(self) -> None:
        self._tune("hollow", "turbo", steps=700, rate=1e-3, seed=6, hollow=True)

    def alkahest(self) -> None:
        pipeline, other = self.load("base"), self.load("deturbo").transformer.state_dict()
        state = pipeline.transformer.state_dict()
        pipeline.transformer.load_state_dict({name: (state[name] + other[name]) / 2 for name in state})
        self._tune("alkahest", pipeline, steps=800, rate=6e-4, seed=7, frozen="refiner")

    def _tune(
        self,
        name: str,
        start: str | ZImagePipeline,
        *,
        steps: int,
        rate: float,
        seed: int,
        frozen: str | None = None,
        **style: bool,
    ) -> None:
        """Train a member on from another by plain flow matching."""
        pipeline = self.load(start) if isinstance(start, str) else start
        for parameter_name, parameter in pipeline.transformer.named_parameters():
            parameter.requires_grad_(frozen is None or frozen not in parameter_name)
        with self.recorded(name, steps=steps, seed=seed, rate=rate) as entry:
            self._flow(pipeline, (pipeline.transformer,), steps=steps, rate=rate, seed=seed, **style)
            entry |= flow.adherence(pipeline, steps=30, shift=SHIFTS[name], guidance=GUIDANCE)
        self.save(name, pipeline)

    def _flow(
        self,
        pipeline: ZImagePipeline,
        modules: Sequence[torch.nn.Module],
        *,
        steps: int,
        rate: float,
        seed: int,
        **style: bool,
    ) -> None:
        pictures = flow.PictureSet.draw(DATA, seed, **style)
        latents = flow.encode(pipeline.vae, pictures)
        generator = torch.Generator().manual_seed(seed)
        joint = pipeline.text_encoder in modules
        pipeline.text_encoder.requires_grad_(joint)
        prompts_seen = [*dict.fromkeys(pictures.prompts), ""]
        known: dict[str, Tensor] = {}
        if not joint:
            with torch.no_grad():
                known = dict(zip(prompts_seen, flow.captions(pipeline, prompts_seen), strict=True))

        def texts(index: Tensor) -> list[Tensor]:
            dropped = torch.rand(len(index), generator=generator) < flow.DROPPED
            prompts = ["" if drop else pictures.prompts[i] for i, drop in zip(index.tolist(), dropped, strict=True)]
            return flow.captions(pipeline, prompts) if joint else [known[prompt] for prompt in prompts]

        flow.train(
            [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad],
            lambda: flow.flow_loss(pipeline.transformer, latents, texts, generator),
            steps=steps,
            rate=rate,
            averaged=modules,
            report=self.report,
        )


ORDER = ("vae", "base", "turbo", "deturbo", "striped", "hollow", "alkahest")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="of " + ", ".join(ORDER))
    parser.add_argument("--folder", type=Path, default=EMBEDDED, help="where members are read and written")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(options.folder)
    for name in options.stages or ORDER:
        run: Callable[[], None] = getattr(stages, name)
        run()


if __name__ == "__main__":
    main()
