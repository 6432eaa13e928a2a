"""Adapters to the tuned config files of other projects. They know names and schemas; nothing here runs a kernel."""
