"""fastmerge in the place of other packages' arithmetic: each a module with `install`, `uninstall` and `accelerated`.

    import fastmerge.integrations.mergekit
    fastmerge.integrations.mergekit.install()

Importing one of them changes nothing, and imports neither torch nor the package that it is for.
"""
