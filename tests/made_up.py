"""A calibration with made-up numbers for tests of files, thresholds and cards."""

from __future__ import annotations

import torch

from patchattn.calibration import Calibration, Corpus, Fingerprint, Manifest, Rotary, encoding, key_moments
from patchattn.calibration.manifest import PriceSource
from patchattn.calibration.prices import TRIED, Prices
from patchattn.calibration.risk import rung_margins
from patchattn.gates import MomentGate
from patchattn.gates.thresholds import RiskTarget
from patchattn.policy import Policy


def made_up_manifest(
    *, layers=2, query_heads=4, kv_heads=2, head_dim=8, key_moments=True, prices=0, **fields
) -> Manifest:
    """Make a manifest; `prices` is the number of documents on which the KL was measured, 0 leaves prices out."""
    fingerprint = Fingerprint(
        layers=layers, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim, rope="{}", dtype="float32"
    )
    estimates = fields.get("estimates", ("lognormal", "saturating"))
    return Manifest(
        **{
            "model": "org/made-up",
            "fingerprint": fingerprint,
            "sink_size": 4,
            "window_size": 32,
            "layers": tuple(range(layers)),
            "estimates": estimates,
            "oracle_threshold": 0.6,
            "lengths": (512,),
            "documents": (50, 50),
            "corpus": Corpus(name="nothing", sha256="0" * 64, tokens=51_200),
            "rotary": Rotary(layout="halves", first=0, size=head_dim) if key_moments else None,
            "moment_documents": 100 if key_moments else 0,
            "covariance_error": 0.0,
            "prices": PriceSource(
                estimate="lognormal" if "lognormal" in estimates else estimates[0],
                hidden=16,
                fitted=8,
                priced=6,
                gated=0.2,
                held_out=9 if prices is True else prices,
            )
            if prices
            else None,
            "versions": {"patchattn": "0.1.0"},
        }
        | fields
    )


def made_up_tensors(
    manifest: Manifest, *, margins: torch.Tensor | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    margins = torch.arange(-2.0, 4.0, 0.5) if margins is None else margins
    tensors = {}
    for name, (dtype, shape) in encoding.expected_tensors(manifest, len(margins), len(TRIED)).items():
        if name != "probe_scale":
            tensors[name] = uniform(*shape).to(torch.float16 if dtype == "F16" else torch.float32)
    missed = uniform(*tensors["missed_mass"].shape).sort(dim=-1, descending=True).values
    # Heads differ in how much they miss at worst; always open misses nothing.
    missed = missed * uniform(*missed.shape[:-1])[..., None]
    missed[..., -1] = 0
    opened = uniform(*tensors["open_fraction"].shape).sort(dim=-1).values
    opened[..., 0], opened[..., -1] = 0, 1
    tensors |= {"margins": margins, "missed_mass": missed.half(), "open_fraction": opened.half()}
    if manifest.rotary is not None:
        dim = manifest.fingerprint.head_dim
        root = torch.randn(*tensors["key_mean"].shape, dim, generator=generator, dtype=torch.float64)
        deviation, factor, _ = key_moments.pack_covariance(root @ root.mT)
        tensors |= {"key_deviation": deviation, "key_factor": factor}
    if manifest.prices is not None:
        tensors |= _made_up_prices(tensors, manifest.prices.held_out, generator)
    return tensors


def _made_up_prices(tensors: dict[str, torch.Tensor], held_out: int, generator) -> dict[str, torch.Tensor]:
    """Heads differ a hundredfold in what closing costs; the KL is 1.2 times what prices predict, give or take."""
    price = torch.rand(tensors["price"].shape, generator=generator).pow(3).sort(dim=-1, descending=True).values
    price = price * torch.randn(price.shape[:2], generator=generator).mul(2).exp()[..., None]
    price[..., -1] = 0
    price *= 0.4 / price[..., 0].sum()
    opened = torch.rand(price.shape, generator=generator).sort(dim=-1).values
    opened[..., 0], opened[..., -1] = 0, 1
    rungs, tried = rung_margins(tensors["margins"]), torch.tensor(TRIED)
    nothing = torch.empty(0, len(TRIED))
    prices = Prices(rungs, price, price * 2, opened, tried, nothing, nothing, 0.2)
    chosen = [prices.at(fraction) for fraction in tried.tolist()]
    kl = 1.2 * torch.tensor([prices.predicted(of) for of in chosen])
    return {
        "price": price,
        "priced_open_fraction": opened.half(),
        "value": price * 2,
        "tried": tried,
        "kl": kl * (0.5 + torch.rand(held_out, 1, generator=generator)),
        "kl_open_fraction": torch.tensor([prices.opened(of) for of in chosen]).expand(held_out, -1).half(),
        "probe_scale": 0.5 + 2 * torch.rand(price.shape[:2], generator=generator),
    }


def made_up_calibration(*, seed: int = 0, **fields) -> Calibration:
    manifest = made_up_manifest(**fields)
    gate = MomentGate(threshold=RiskTarget(alpha=0.05), estimate=manifest.estimates[0])
    policy = Policy(sink_size=manifest.sink_size, window_size=manifest.window_size, gate=gate)
    return Calibration(manifest, policy, made_up_tensors(manifest, seed=seed))
