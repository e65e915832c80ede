// swift-tools-version: 6.2
import PackageDescription

// Loads of class fields on the data path must not pay for dynamic exclusivity checks; the sanitizer
// runs (debug) keep them.
let releaseFlags: [SwiftSetting] = [
  .swiftLanguageMode(.v6),
  .enableUpcomingFeature("ExistentialAny"),
  .enableUpcomingFeature("MemberImportVisibility"),
  .treatAllWarnings(as: .error),
  .unsafeFlags(
    ["-cross-module-optimization", "-enforce-exclusivity=unchecked"],
    .when(configuration: .release)),
]

let exportsMap = "\(Context.packageDirectory)/Sources/MooncakeLibrary/exports.map"

let package = Package(
  name: "libmooncake",
  products: [
    .library(name: "mooncake", type: .dynamic, targets: ["MooncakeLibrary"]),
    .library(name: "MooncakeEngine", targets: ["MooncakeEngine"]),
    .library(name: "MooncakeP2P", targets: ["MooncakeP2P"]),
    .executable(name: "mooncake-cli", targets: ["MooncakeCommand"]),
  ],
  dependencies: [
    .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.0"),
    .package(url: "https://github.com/HdrHistogram/hdrhistogram-swift", from: "0.2.0"),
  ],
  targets: [
    .systemLibrary(name: "CMooncake", path: "include"),
    .systemLibrary(name: "CLinux", path: "Sources/CLinux"),
    .systemLibrary(name: "CJSON", path: "Sources/CJSON", pkgConfig: "libcjson"),
    // Opened when first used: no pkgConfig and no link line, which would make them needed to load.
    .systemLibrary(name: "CCurl", path: "Sources/CCurl"),
    .systemLibrary(name: "CHiredis", path: "Sources/CHiredis"),
    .systemLibrary(name: "CMicroHTTP", path: "Sources/CMicroHTTP"),
    // Headers only: what it offers is compiled into its users.
    .systemLibrary(name: "CXXHash", path: "Sources/CXXHash"),
    // Only the library: it needs the Swift runtime linked statically.
    .systemLibrary(name: "CSwiftRuntime", path: "Sources/CSwiftRuntime"),
    .target(name: "MooncakeSystem", dependencies: ["CLinux"], swiftSettings: releaseFlags),
    .target(
      name: "MooncakeBase", dependencies: ["MooncakeSystem", "CLinux", "CJSON"],
      swiftSettings: releaseFlags),
    .target(
      name: "MooncakeMetadata",
      dependencies: [
        "MooncakeBase", "MooncakeSystem", "CLinux", "CCurl", "CHiredis", "CMicroHTTP",
      ],
      swiftSettings: releaseFlags),
    .target(
      name: "MooncakeEngine",
      dependencies: ["MooncakeMetadata", "MooncakeBase", "MooncakeSystem", "CLinux"],
      swiftSettings: releaseFlags),
    .target(
      name: "MooncakeP2P",
      dependencies: [
        "MooncakeEngine", "MooncakeMetadata", "MooncakeBase", "MooncakeSystem", "CLinux", "CXXHash",
      ],
      swiftSettings: releaseFlags),
    .target(
      name: "MooncakeABI",
      dependencies: [
        "MooncakeP2P", "MooncakeEngine", "MooncakeMetadata", "MooncakeBase", "MooncakeSystem",
        "CMooncake",
      ],
      swiftSettings: releaseFlags),
    // Linker settings spread to everything that depends on a target, so this one has no dependents.
    .target(
      name: "MooncakeLibrary", dependencies: ["MooncakeABI", "CSwiftRuntime"],
      exclude: ["exports.map"],
      swiftSettings: releaseFlags,
      linkerSettings: [
        .unsafeFlags(
          [
            "-static-stdlib", "-use-ld=lld",
            "-Xlinker", "--version-script=\(exportsMap)",
            "-Xlinker", "-soname=libmooncake.so.0", "-Xlinker", "--gc-sections",
            "-Xlinker", "-z", "-Xlinker", "defs", "-Xlinker", "-z", "-Xlinker", "nodelete",
          ], .when(configuration: .release))
      ]),
    .executableTarget(
      name: "MooncakeCommand",
      dependencies: [
        "MooncakeP2P", "MooncakeEngine", "MooncakeMetadata", "MooncakeBase", "MooncakeSystem",
        .product(name: "ArgumentParser", package: "swift-argument-parser"),
        .product(name: "Histogram", package: "hdrhistogram-swift"),
      ],
      path: "Sources/mooncake", swiftSettings: releaseFlags),
    .executableTarget(
      name: "MooncakeTestPeer",
      dependencies: [
        "MooncakeEngine", "MooncakeBase", "MooncakeSystem", "CLinux", "CompletionQueueTransport",
      ],
      path: "Tests/TestPeer", swiftSettings: releaseFlags),
    .target(
      name: "SwarmSimulation", dependencies: ["MooncakeP2P", "MooncakeBase", "CLinux"],
      path: "Tests/SwarmSimulation",
      swiftSettings: releaseFlags),
    .executableTarget(
      name: "swarm-simulation", dependencies: ["SwarmSimulation", "MooncakeP2P", "MooncakeBase"],
      path: "benchmarks/simulation", swiftSettings: releaseFlags),
    // In a module of its own, since peers in processes of their own use it as well.
    .target(
      name: "CompletionQueueTransport",
      dependencies: ["MooncakeEngine", "MooncakeBase", "MooncakeSystem", "CLinux"],
      path: "Tests/MooncakeEngineTests/Transport/CompletionQueue/Transport",
      swiftSettings: releaseFlags),
    .target(
      name: "MooncakeTestSupport", dependencies: ["MooncakeSystem", "CLinux"],
      path: "Tests/Support", swiftSettings: releaseFlags),
    .testTarget(
      name: "MooncakeSystemTests",
      dependencies: ["MooncakeSystem", "CLinux", "MooncakeTestSupport"],
      swiftSettings: releaseFlags),
    .testTarget(
      name: "MooncakeBaseTests",
      dependencies: ["MooncakeBase", "MooncakeSystem", "CLinux", "MooncakeTestSupport"],
      swiftSettings: releaseFlags),
    .testTarget(
      name: "MooncakeMetadataTests",
      dependencies: [
        "MooncakeMetadata", "MooncakeBase", "MooncakeSystem", "CLinux", "MooncakeTestSupport",
      ],
      swiftSettings: releaseFlags),
    .testTarget(
      name: "MooncakeEngineTests",
      dependencies: [
        "MooncakeEngine", "MooncakeMetadata", "MooncakeBase", "MooncakeSystem", "CLinux",
        "MooncakeTestSupport", "MooncakeTestPeer", "CompletionQueueTransport",
      ],
      exclude: ["Transport/CompletionQueue/Transport"], swiftSettings: releaseFlags),
    .testTarget(
      name: "MooncakeP2PTests",
      dependencies: [
        "MooncakeP2P", "MooncakeEngine", "MooncakeMetadata", "MooncakeBase", "MooncakeSystem",
        "CXXHash", "SwarmSimulation", "MooncakeTestSupport",
      ],
      swiftSettings: releaseFlags),
  ]
)
