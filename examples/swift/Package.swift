// swift-tools-version: 6.2
import PackageDescription

let package = Package(
  name: "mooncake-examples",
  dependencies: [.package(name: "libmooncake", path: "../..")],
  targets: [
    .systemLibrary(
      name: "CCrypto", path: "Sources/CCrypto", pkgConfig: "libcrypto",
      providers: [.apt(["libssl-dev"])]),
    .systemLibrary(name: "CSignals", path: "Sources/CSignals"),
    .target(
      name: "ModelTransfer",
      dependencies: [.product(name: "MooncakeEngine", package: "libmooncake"), "CCrypto"]),
    .executableTarget(
      name: "Trainer",
      dependencies: [
        .product(name: "MooncakeEngine", package: "libmooncake"), "ModelTransfer", "CSignals",
      ]),
    .executableTarget(
      name: "Inferencer",
      dependencies: [.product(name: "MooncakeEngine", package: "libmooncake"), "ModelTransfer"]),
    .executableTarget(
      name: "StorePublish",
      dependencies: [.product(name: "MooncakeP2P", package: "libmooncake"), "ModelTransfer"]),
    .executableTarget(
      name: "StoreGet",
      dependencies: [.product(name: "MooncakeP2P", package: "libmooncake"), "ModelTransfer"]),
  ]
)
