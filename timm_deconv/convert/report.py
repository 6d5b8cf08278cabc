"""What a conversion did, layer by layer."""

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["ConversionReport", "ConvertedLayer"]


@dataclass(frozen=True)
class ConvertedLayer:
    """A whitened layer: `blocks` of `features` each; `options` is what differs from the published settings."""

    name: str
    role: str
    kind: str
    blocks: int
    features: int
    options: str


@dataclass
class ConversionReport:
    """Result of `convert_deconv_model`; prints as a table.

    Attributes:
        converted: whitened layers in network order.
        skipped: (name, reason) of the layers with a weight matrix that were left plain.
        norms: names of the batch norms taken out.
        norms_kept: (name, reason) of the batch norms that stay, as a plain layer reads them.
        norms_left: (name, class) of the other normalisation layers, which stay.
        affine: names of the batch norms that stay as a scale and shift of each channel (`transfer`).
        unseen: why the network did not run to its end, if it did not: roles of what was not computed were taken from
            shapes alone, and norms judged by the layers beside them.
        parameters_before, parameters_after: counts.
    """

    parameters_before: int
    parameters_after: int = 0
    converted: list[ConvertedLayer] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    norms_kept: list[tuple[str, str]] = field(default_factory=list)
    norms_left: list[tuple[str, str]] = field(default_factory=list)
    affine: list[str] = field(default_factory=list)
    unseen: str | None = None

    def __str__(self) -> str:
        rows = [("layer", "role", "becomes", "blocks x features", "options")]
        rows += [(c.name, c.role, c.kind, f"{c.blocks} x {c.features}", c.options) for c in self.converted]
        rows += [(name, "", "(plain)", "", reason) for name, reason in self.skipped]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, *self._summary()])

    def _summary(self) -> list[str]:
        lines = [
            f"{len(self.converted)} layers whitened, {len(self.skipped)} left plain, {len(self.norms)} batch norms"
            f" removed, {self.parameters_before:,} -> {self.parameters_after:,} parameters"
        ]
        if self.affine:
            lines.append(f"{len(self.affine)} of the batch norms left as scale and shift")
        if self.norms_kept:
            lines.append(f"{len(self.norms_kept)} batch norms stay:")
            lines += [f"  {name}: {reason}" for name, reason in self.norms_kept]
        if self.unseen:
            lines.append(
                f"roles of what did not run are by shape alone, norms by the layers beside them: {self.unseen}"
            )
        if self.norms_left:
            kinds = sorted(Counter(kind for _, kind in self.norms_left).items())
            lines.append("other norms, left as they are: " + ", ".join(f"{n} {kind}" for kind, n in kinds))
        return lines
