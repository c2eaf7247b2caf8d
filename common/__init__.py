"""What the toys and the folders share: flags and files, teachers, the static policy, figures."""
