"""Reports: from run.json to what people and CI systems read."""
