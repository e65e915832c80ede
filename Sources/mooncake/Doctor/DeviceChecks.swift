/// RDMA and NVMe devices of this machine.
enum DeviceChecks {
  static func run() -> [Finding] { rdma() + nvme() }

  private static func rdma() -> [Finding] {
    let root = "/sys/class/infiniband"
    let names = SystemFiles.names(in: root)
    if names.isEmpty { return [.ok("RDMA", "no device; transfers go over TCP")] }
    return names.flatMap { name in
      SystemFiles.names(in: "\(root)/\(name)/ports").map { port in
        check(device: name, port: port, path: "\(root)/\(name)/ports/\(port)")
      }
    }
  }

  private static func check(device: String, port: String, path: String) -> Finding {
    let state = SystemFiles.text("\(path)/state") ?? "unknown"
    let rate = SystemFiles.text("\(path)/rate") ?? "unknown rate"
    let layer = SystemFiles.text("\(path)/link_layer") ?? "unknown link"
    let subject = "RDMA \(device) port \(port)"
    let detail = "\(state), \(rate), \(layer)"
    if state.hasSuffix("ACTIVE") { return .ok(subject, detail) }
    return .warning(
      subject, detail, advice: "connect the cable, or bring up its interface: rdma link show")
  }

  private static func nvme() -> [Finding] {
    let root = "/sys/class/nvme"
    let names = SystemFiles.names(in: root)
    if names.isEmpty { return [.ok("NVMe", "no controller")] }
    return names.map { name in
      let model = SystemFiles.text("\(root)/\(name)/model") ?? "unknown model"
      let transport = SystemFiles.text("\(root)/\(name)/transport") ?? "unknown transport"
      return .ok("NVMe \(name)", "\(model), \(transport)")
    }
  }
}
