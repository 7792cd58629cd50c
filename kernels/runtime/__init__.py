"""Everything that launches need, without kernels: configurations, the launch guard, chips, sizes, dtypes."""
