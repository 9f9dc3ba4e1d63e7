"""The training loop: one Lightning module, manual optimization, whatever the method or layout."""
