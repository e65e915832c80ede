import MooncakeSystem

/// Shared libraries that parts of the library open on first use.
enum LibraryChecks {
  private struct Entry {
    var title: String
    /// Versioned names, newest first.
    var names: [String]
    var purpose: String
    var package: String
  }

  private static let entries = [
    Entry(
      title: "libcurl", names: ["libcurl.so.4"],
      purpose: "metadata in etcd or on an HTTP server", package: "libcurl4"),
    Entry(
      title: "hiredis", names: ["libhiredis.so.0.14"], purpose: "metadata in Redis",
      package: "libhiredis0.14"),
    Entry(
      title: "libmicrohttpd", names: ["libmicrohttpd.so.12"],
      purpose: "mooncake metadata serve", package: "libmicrohttpd12"),
    Entry(
      title: "libibverbs", names: ["libibverbs.so.1"], purpose: "RDMA",
      package: "libibverbs1 and ibverbs-providers"),
    Entry(
      title: "librdmacm", names: ["librdmacm.so.1"], purpose: "RDMA", package: "librdmacm1"),
    Entry(
      title: "libnvme", names: ["libnvme.so.1"], purpose: "NVMe-oF segments", package: "libnvme1"),
    Entry(
      title: "libfuse3", names: ["libfuse3.so.4", "libfuse3.so.3"],
      purpose: "mounting shared models as files", package: "libfuse3-3"),
    Entry(
      title: "OpenSSL", names: ["libssl.so.3"], purpose: "TLS between peers", package: "libssl3"),
  ]

  static func run() -> [Finding] { entries.map(check) }

  private static func check(_ entry: Entry) -> Finding {
    if let name = entry.names.first(where: { DynamicLibrary($0) != nil }) {
      return .ok(entry.title, "\(name) (\(entry.purpose))")
    }
    let advice = "apt-get install \(entry.package)"
    // Without RDMA devices the RDMA libraries are not missed.
    if entry.purpose == "RDMA" && !SystemFiles.names(in: "/sys/class/infiniband").isEmpty {
      return .warning(
        entry.title, "not installed, but there are RDMA devices", advice: advice)
    }
    return .ok(
      entry.title, "not installed; TCP does not need it",
      advice: "for \(entry.purpose): \(advice)")
  }
}
