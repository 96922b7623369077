"""Methods: one file here and one YAML in ``conf/merging`` or ``conf/baseline`` each."""
