"""Draws curve.svg from curve.csv: NDCG@10 on test by the tokens of CSFT, with and without IEM, 95 % over users."""

from pathlib import Path

import matplotlib
import polars as pl
from matplotlib.figure import Figure

HERE = Path(__file__).parent
STYLES = {"CSFT": ("#0072b2", "o"), "after IEM": ("#d55e00", "s")}
matplotlib.rcParams |= {"svg.hashsalt": "llm2rec", "svg.fonttype": "none"}

table = pl.read_csv(HERE / "curve.csv")
figure = Figure(figsize=(8, 3.2), layout="constrained")
for axes, (adapter,) in zip(
    figure.subplots(1, 2), table.select("adapter").unique(maintain_order=True).rows(), strict=True
):
    for vectors, (colour, marker) in STYLES.items():
        points = table.filter(adapter=adapter, vectors=vectors)
        mean = points["ndcg"]
        reach = [mean - points["low"], points["high"] - mean]
        thousands = points["csft_tokens"] / 1000
        axes.errorbar(thousands, mean, yerr=reach, label=vectors, color=colour, marker=marker, capsize=3)
    axes.set(title=adapter, xlabel="thousand tokens of CSFT", ylabel="NDCG@10, test")
    axes.legend(frameon=False)
figure.savefig(HERE / "curve.svg", metadata={"Date": None})
