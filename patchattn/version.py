"""The version of the package, also right for a checkout that is on the path without being installed."""

VERSION = "0.1.0"
