"""Studies on top of single runs: ablations, gradient maps, their pictures and reports."""
