"""What launches need and no kernel is: configurations, the launch guard, chips, sizes, dtypes."""
