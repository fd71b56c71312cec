"""Opening models, and making their forward and backward passes faster or smaller."""
