"""The trainer: collect -> dataset -> fit -> evaluate -> gate -> publish -> promote, on a schedule."""
