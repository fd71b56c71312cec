"""Opening models, and what makes their passes faster or smaller."""
