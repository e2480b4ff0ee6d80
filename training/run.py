"""Training that stops at any step and goes on there: data, steps, state, measurement and record of a member."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import provenance
from training import checker, data, losses, measuring, models, sampling
from training.optimiser import Optimiser
from training.recipes import DRAWN_SEED, GUIDANCE, RECIPES, Gate, Recipe
from training.world import SIZES

SAVED_EVERY = 120.0
"""Seconds between two states on disk."""

VALIDATED_EVERY = 500
VALIDATED_ON = 512


@dataclass
class Clock:
    """When to stop: at a deadline, or when the process is told to end."""

    deadline: float = float("inf")
    told: bool = False

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "told", True))

    def paused(self) -> bool:
        return self.told or time.monotonic() > self.deadline


@dataclass
class Attempt:
    """One attempt: where its members are kept, where its states are, and what it runs on."""

    number: int
    members: Path
    states: Path
    device: torch.device
    clock: Clock = field(default_factory=Clock)
    recipes: dict[str, Recipe] = field(default_factory=lambda: dict(RECIPES))

    def __post_init__(self) -> None:
        self.stored = models.Attempt(self.members)
        self.members.mkdir(parents=True, exist_ok=True)

    # ---- the record

    @property
    def record_path(self) -> Path:
        return self.members / "record.json"

    def record(self) -> dict[str, Any]:
        return json.loads(self.record_path.read_text()) if self.record_path.exists() else {}

    def note(self, name: str, entry: dict[str, Any]) -> None:
        staged = self.record_path.with_suffix(".new")
        staged.write_text(json.dumps(self.record() | {name: entry}, indent=1) + "\n")
        os.replace(staged, self.record_path)

    def finished(self, name: str) -> bool:
        return bool(self.record().get(name, {}).get("finished"))

    # ---- one member

    def train(self, name: str) -> bool:
        """Train a member until it is finished; False when the clock stopped it before."""
        while not self.finished(name):
            recipe = self.recipes[name]
            for start in recipe.start:
                if not self.finished(start):
                    raise SystemExit(f"{name} starts from {start}, which is not finished; train it first.")
            if not self._data(recipe):
                return False
            if not Round(self, recipe).train():
                return False
        return True

    def seed(self, recipe: Recipe) -> int:
        return recipe.seed + 1000 * self.number

    def sets(self, recipe: Recipe) -> list[tuple[Path, data.Plan]]:
        """The folders of the data of a member."""
        if recipe.loss == "trip":
            return [(self.states / "data" / "pictures", recipe.plan)]
        folders = []
        for source in recipe.data:
            style = "-striped" if recipe.striped else "-hollow" if recipe.hollow else ""
            folders.append((self.states / "data" / (source.replace(":", "-") + style), recipe.plan))
        return folders

    def _data(self, recipe: Recipe) -> bool:
        return all(
            self._set(recipe, source, *where) for source, where in zip(recipe.data, self.sets(recipe), strict=True)
        )

    def _set(self, recipe: Recipe, source: str, folder: Path, plan: data.Plan) -> bool:
        if all((folder / f"{number:04}.pt").exists() for number in range(sum(plan.chunks))):
            return True
        print(f"{recipe.name}: making {folder.name}", flush=True)
        seed = DRAWN_SEED + 1000 * self.number
        maker: Callable[[int, tuple[int, int]], data.Chunk]
        if recipe.loss == "trip":

            def maker(number: int, size: tuple[int, int]) -> data.Chunk:
                style = {"striped": number % 2 == 1, "hollow": number // 2 % 2 == 1}
                pictures, scenes = data.drawn(number, size, plan.each, seed + 1, **style)
                pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
                return {"latents": pixels, "prompts": [scene.prompt for scene in scenes]}

        elif source == "drawn":
            vae = self.stored.vae().to(self.device)

            def maker(number: int, size: tuple[int, int]) -> data.Chunk:
                style = {"striped": recipe.striped, "hollow": recipe.hollow}
                return data.drawn_chunk(
                    vae, number, size, plan.each, seed + 2 * recipe.striped + 3 * recipe.hollow, **style
                )

        else:
            name = source.removeprefix("path:")
            painter_recipe = self.recipes[name]
            whole = name != source
            steps, guidance = painter_recipe.drawn_with
            levels = losses.path_levels() if whole else sampling.grid(min(steps, 20), painter_recipe.shift)
            painter = data.Painter(
                self.stored.transformer(name).to(self.device).eval(),
                self.reader(),
                levels,
                GUIDANCE if whole else guidance,
            )
            made = painter.path_chunk if whole else painter.picture_chunk

            def maker(number: int, size: tuple[int, int]) -> data.Chunk:
                return made(number, size, plan.each, seed + 10 + painter_recipe.seed)

        began, cpu = time.monotonic(), time.process_time()
        done = data.make(folder, plan, maker, self.clock.paused)
        spent = self.record().get("data", {}).get(folder.name, {"wall": 0, "cpu": 0})
        spent = {
            "wall": round(spent["wall"] + time.monotonic() - began),
            "cpu": round(spent["cpu"] + time.process_time() - cpu),
        }
        self.note("data", self.record().get("data", {}) | {folder.name: spent})
        return done

    def reader(self) -> sampling.Reader:
        return sampling.Reader(self.stored.tokenizer(), self.stored.text_encoder().to(self.device))


class Round:
    """One round of a member's training: the first, or the one extension that PLAN.md allows."""

    def __init__(self, attempt: Attempt, recipe: Recipe) -> None:
        self.attempt, self.recipe = attempt, recipe
        self.entry: dict[str, Any] = attempt.record().get(recipe.name, {"rounds": []})
        rounds: list[dict[str, Any]] = self.entry["rounds"]
        self.number = max(1, len(rounds))
        self.steps = recipe.steps if self.number == 1 else recipe.steps // 2
        self.state_path = attempt.states / f"{recipe.name}.pt"
        self.seed = attempt.seed(recipe) + 500 * (self.number - 1)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.step, self.running, self.losses = 0, 0.0, []
        self.pieces: list[dict[str, Any]] = []
        torch.manual_seed(self.seed)
        self._build()

    # ---- building

    def _build(self) -> None:
        attempt, recipe, device = self.attempt, self.recipe, self.attempt.device
        again = self.number > 1
        self.modules: dict[str, torch.nn.Module] = {}
        if recipe.loss == "trip":
            vae = attempt.stored.vae() if again else models.vae()
            vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
            self.modules["vae"] = vae.to(device)
            self.samples = data.Samples(attempt.sets(recipe))
            self.loss = self._trip
        else:
            self._build_transformer(again)
            self.samples = data.Samples(attempt.sets(recipe))
            self.loss = self._transformer_loss
            self._read_captions()
        self.optimiser = Optimiser(self.modules, rate=recipe.rate, steps=self.steps, cosine=recipe.cosine or again)
        if self.state_path.exists():
            self._restore()
        elif self.shelf.with_suffix(".json").exists():
            self._unshelve()

    def _build_transformer(self, again: bool) -> None:
        attempt, recipe, device = self.attempt, self.recipe, self.attempt.device
        tokenizer = attempt.stored.tokenizer() if (attempt.members / "tokenizer").exists() else None
        if not recipe.start:
            tokenizer = tokenizer or models.tokenizer(attempt.states / "tokenizer")
            encoder, model = models.text_encoder(len(tokenizer)), models.transformer()
            if again:
                encoder, model = attempt.stored.text_encoder(), attempt.stored.transformer(recipe.name)
        else:
            encoder = attempt.stored.text_encoder()
            parents = [attempt.stored.transformer(name) for name in ((recipe.name,) if again else recipe.start)]
            model, states = parents[0], [parent.state_dict() for parent in parents]
            model.load_state_dict({key: sum(state[key] for state in states) / len(states) for key in states[0]})
            if recipe.renewed and not again:
                models.renew(model, models.transformer())
        assert tokenizer is not None
        encoder.requires_grad_(recipe.joint)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(recipe.frozen is None or recipe.frozen not in name)
        self.modules["transformer"] = model.to(device).train()
        if recipe.joint:
            self.modules["text_encoder"] = encoder
        self.reader = sampling.Reader(tokenizer, encoder.to(device))

    def _read_captions(self) -> None:
        recipe, device = self.recipe, self.attempt.device
        vae = self.attempt.stored.vae().to(device)
        style = {"striped": recipe.striped, "hollow": recipe.hollow}
        self.clean, self.clean_prompts = data.validation(vae, VALIDATED_ON, self.attempt.seed(recipe), **style)
        if not recipe.joint:
            self.read = self.reader.many(self.samples.prompts)
            self.read_clean = self.reader.many(self.clean_prompts)

    # ---- losses

    def _captions(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        if self.recipe.joint:
            return self.reader([self.samples.prompts[i] for i in numbers.tolist()])
        states, known = self.read
        numbers = numbers.to(states.device)
        return states[numbers], known[numbers]

    def _transformer_loss(self) -> Tensor:
        learn = losses.flow if self.recipe.loss == "flow" else losses.distilled
        return learn(self.modules["transformer"], self.samples, self._captions, self.generator, self.attempt.device)

    def _trip(self) -> Tensor:
        pixels, _ = self.samples.draw(losses.BATCH // 2, self.generator)
        wanted = pixels.to(self.attempt.device).float() / 127.5 - 1
        size = (len(wanted), models.CHANNELS, *(side // models.REDUCTION for side in wanted.shape[2:]))
        noise = torch.randn(size, generator=self.generator).to(self.attempt.device)
        return losses.trip(self.modules["vae"], wanted, noise)

    @torch.no_grad()
    def validated(self) -> float:
        """The flow loss of the averaged weights on drawn held-out pairs, with fixed noise and levels."""
        kept = {name: {k: t.clone() for k, t in module.state_dict().items()} for name, module in self.modules.items()}
        self.optimiser.settle()
        generator, device = torch.Generator().manual_seed(11), self.attempt.device
        read = self.reader.many(self.clean_prompts) if self.recipe.joint else self.read_clean
        found = []
        for start in range(0, len(self.clean), losses.BATCH):
            clean = self.clean[start : start + losses.BATCH]
            noise = torch.randn(clean.shape, generator=generator).to(device)
            even = (torch.arange(len(clean)) + 0.5).to(device) / len(clean)
            captions = tuple(part[start : start + losses.BATCH] for part in read)
            model = self.modules["transformer"]
            found.append(float(losses.flow_at(model, clean.to(device), noise, 3 * even / (1 + 2 * even), captions)))
        for name, module in self.modules.items():
            module.load_state_dict(kept[name])
        return round(float(np.mean(found)), 5)

    # ---- the loop

    def train(self) -> bool:
        """Train to the end of this round, measure and store; False when the clock stopped it before."""
        clock = self.attempt.clock
        began, cpu, first = time.monotonic(), time.process_time(), self.step
        saved = began
        while self.step < self.steps and not clock.paused():
            value = self.loss()
            self.optimiser.step(value, self.step)
            self.step += 1
            self.running = value.item() if self.step == 1 else 0.98 * self.running + 0.02 * value.item()
            if self.step % 50 == 0 or self.step == self.steps:
                self._report(time.monotonic() - began, self.step - first)
            if time.monotonic() - saved > SAVED_EVERY:
                self._save([*self.pieces, self._piece(first, began, cpu)])
                saved = time.monotonic()
        self.pieces.append(self._piece(first, began, cpu))
        self._save(self.pieces)
        if self.step < self.steps:
            print(f"{self.recipe.name}: paused at step {self.step} of {self.steps}", flush=True)
            return False
        self._finish()
        return True

    def _report(self, seconds: float, steps: int) -> None:
        row: list[float] = [self.step, round(self.running, 5)]
        if self.recipe.loss != "trip" and (self.step % VALIDATED_EVERY == 0 or self.step == self.steps):
            row.append(self.validated())
        self.losses.append(row)
        tail = f"  validation {row[2]:.4f}" if len(row) > 2 else ""
        print(
            f"  {self.recipe.name} step {self.step:5}  loss {row[1]:.4f}  {seconds / steps:.2f} s a step{tail}",
            flush=True,
        )

    def _piece(self, first: int, began: float, cpu: float) -> dict[str, Any]:
        return {
            "steps": [first, self.step],
            "wall_seconds": round(time.monotonic() - began),
            "cpu_seconds": round(time.process_time() - cpu),
            "machine": provenance.machine(self.attempt.members),
            "device": str(self.attempt.device),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "commit": provenance.commit(),
        }

    def _save(self, pieces: list[dict[str, Any]]) -> None:
        state = {
            "round": self.number,
            "step": self.step,
            "running": self.running,
            "losses": self.losses,
            "pieces": pieces,
            "generator": self.generator.get_state(),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimiser": self.optimiser.state(),
        }
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.state_path.with_suffix(".new")
        torch.save(state, staged)
        os.replace(staged, self.state_path)

    def _restore(self) -> None:
        state = torch.load(self.state_path, weights_only=True, map_location=self.attempt.device)
        if state["round"] != self.number:
            return
        self.step, self.running, self.losses = state["step"], state["running"], state["losses"]
        self.pieces = state["pieces"]
        self.generator.set_state(state["generator"].cpu())
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimiser.restore(state["optimiser"])

    # ---- a round that another machine goes on with

    @property
    def shelf(self) -> Path:
        return self.attempt.members / "unfinished" / self.recipe.name

    def shelve(self) -> None:
        """Keep what has been trained in half precision beside the members, a tenth of a state: the optimisers' moments begin anew."""
        tensors = {
            f"{kind}/{name}/{key}": tensor.half().contiguous()
            for kind, states in (
                ("weights", {name: module.state_dict() for name, module in self.modules.items()}),
                ("averages", self.optimiser.averages),
            )
            for name, state in states.items()
            for key, tensor in state.items()
        }
        self.shelf.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self.shelf.with_suffix(".safetensors"))
        facts = {
            "unfinished": f"step {self.step} of {self.steps}",
            "round": self.number,
            "step": self.step,
            "running": self.running,
            "losses": self.losses,
            "pieces": self.pieces,
            "generator": bytes(self.generator.get_state().tolist()).hex(),
        }
        self.shelf.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")

    def _unshelve(self) -> None:
        facts = json.loads(self.shelf.with_suffix(".json").read_text())
        if facts["round"] != self.number:
            return
        self.step, self.running, self.losses = facts["step"], facts["running"], facts["losses"]
        self.pieces = facts["pieces"]
        self.generator.set_state(torch.tensor(list(bytes.fromhex(facts["generator"])), dtype=torch.uint8))
        tensors = load_file(self.shelf.with_suffix(".safetensors"))
        for name, module in self.modules.items():
            kinds = {
                kind: {key: tensors[f"{kind}/{name}/{key}"].float() for key in module.state_dict()}
                for kind in ("weights", "averages")
            }
            module.load_state_dict(kinds["weights"])
            for key, tensor in self.optimiser.averages[name].items():
                tensor.copy_(kinds["averages"][key])

    # ---- the end of a round

    def _finish(self) -> None:
        self.optimiser.settle()
        recipe, attempt = self.recipe, self.attempt
        if recipe.loss == "trip":
            measured, passed = self._store_vae()
        else:
            measured, passed = self._store_transformer()
        ended = {
            "steps": self.steps,
            "rate": recipe.rate,
            "seed": self.seed,
            "pieces": self.pieces,
            "loss": self.losses,
            "measured": measured,
            "passed": passed,
        }
        rounds = [*self.entry["rounds"][: self.number - 1], ended]
        extended = not passed and self.number == 1
        if extended:
            rounds.append({"steps": self.steps // 2})
        attempt.note(
            recipe.name, {"start": list(recipe.start), "rounds": rounds, "finished": not extended, "passed": passed}
        )
        for path in (self.state_path, self.shelf.with_suffix(".json"), self.shelf.with_suffix(".safetensors")):
            path.unlink(missing_ok=True)
        print(f"{recipe.name}: {measured}, {'passed' if passed else 'missed its gate'}", flush=True)

    def _store_vae(self) -> tuple[dict[str, float], bool]:
        attempt, device = self.attempt, self.attempt.device
        vae: AutoencoderKL = self.modules["vae"].eval()
        vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
        latents = sampling.encode(vae, self.samples.latents[0][:4096].permute(0, 2, 3, 1).numpy())
        vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
        models.store(vae, attempt.members / "vae")
        stored = attempt.stored.vae().to(device)
        right, errors, shown = [], [], []
        for number, style in enumerate(({}, {"striped": True}, {"hollow": True}, {"striped": True, "hollow": True})):
            pictures, scenes = data.drawn(10**6 + number, SIZES[0], 128, self.attempt.seed(self.recipe), **style)
            found = sampling.decode(stored, sampling.encode(stored, pictures))
            for picture, scene in zip(found, scenes, strict=True):
                reading = checker.read(picture)
                wanted = (style.get("striped", False), style.get("hollow", False))
                right.append(reading.matches(scene) and (reading.striped, reading.hollow) == wanted)
            errors.append(float(((found.astype(float) - pictures) ** 2).mean()))
            shown.append((found[:8], scenes[:8]))
        wanted_scenes = [scene for _, part in shown for scene in part]
        measuring.sheet(
            np.concatenate([part for part, _ in shown]), wanted_scenes, attempt.members / "sheets" / "vae.png"
        )
        psnr = 10 * float(np.log10(255**2 / np.mean(errors)))
        measured = {
            "read right": round(float(np.mean(right)), 4),
            "psnr": round(psnr, 2),
            "scaling": round(float(1 / latents.std()), 4),
        }
        return measured, measured["read right"] >= 0.99

    def _store_transformer(self) -> tuple[dict[str, float], bool]:
        attempt, recipe, device = self.attempt, self.recipe, self.attempt.device
        models.store(self.modules["transformer"], attempt.members / recipe.name / "transformer")
        if recipe.joint:
            models.store(self.reader.encoder, attempt.members / "text_encoder")
            self.reader.tokenizer.save_pretrained(attempt.members / "tokenizer")
            models.forget_paths(attempt.members / "tokenizer")
        model, vae = attempt.stored.transformer(recipe.name).to(device).eval(), attempt.stored.vae().to(device)
        reader, wanted = attempt.reader(), measuring.scenes(256)
        steps, guidance = recipe.drawn_with
        pictures = measuring.draw(model, vae, reader, wanted, steps=steps, guidance=guidance, shift=recipe.shift)
        shown = measuring.IN_SHEET
        measuring.sheet(pictures[:shown], wanted[:shown], attempt.members / "sheets" / f"{recipe.name}.png")
        measured = measuring.shares(pictures, wanted)
        gate = recipe.gate or Gate(0.0)
        passed = all(measured[key] >= getattr(gate, key) for key in ("adherence", "striped", "hollow"))
        return measured, passed
