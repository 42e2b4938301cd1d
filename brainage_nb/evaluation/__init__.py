"""How good: metrics, bias correction, intervals, figures and the report. Never imports torch."""
