@_exported import MooncakeABI
