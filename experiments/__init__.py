"""Single files that answer one question each; they import the package, never the other way round."""
