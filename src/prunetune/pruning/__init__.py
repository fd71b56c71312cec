"""What can be pruned, gated or cut: sites, units, masks and the exact cut."""
