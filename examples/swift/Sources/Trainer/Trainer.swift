// Offers a model file to inferencers until SIGINT or SIGTERM, or the end of stdin if that is a
// terminal, pipe or socket.
//
//   Trainer [--bind ADDRESS] [--advertise HOST] [--port PORT] [--info FILE] MODEL
import CSignals
import Glibc
import ModelTransfer
import MooncakeEngine

@main
enum Trainer {
  static func main() {
    do {
      let arguments = try Arguments(known: ["--bind", "--advertise", "--port", "--info"])
      guard arguments.plain.count == 1 else { throw ExampleError("name one model file") }
      let signals = try blockSignals()
      // Stays mapped until the engine in `serve` is closed.
      let model = try ModelFile(path: arguments.plain[0])
      try serve(model, arguments, until: signals)
    } catch {
      exitWithFailure("trainer", error)
    }
  }

  private static func serve(
    _ model: borrowing ModelFile, _ arguments: Arguments, until signals: Int32
  ) throws {
    var options = TransferEngine.Options()
    options.bindAddress = arguments["--bind"]
    options.advertisedAddress = arguments["--advertise"]
    if let text = arguments["--port"] {
      guard let port = UInt16(text) else { throw ExampleError("--port \(text) is no port") }
      options.port = port
    }
    let engine = try TransferEngine(options)
    defer { engine.close() }
    try engine.register(model.address, length: UInt64(model.length), access: .remoteRead)

    let hash = try sha256(UnsafeRawBufferPointer(start: model.address, count: model.length))
    let offer = Offer(
      segmentName: engine.name, address: UInt64(UInt(bitPattern: model.address)),
      length: UInt64(model.length), hash: hash)
    if let path = arguments["--info"] {
      var line = "\(offer)\n"
      try line.withUTF8 { try writeFile(UnsafeRawBufferPointer($0), to: path) }
    }
    print(offer)
    fflush(nil)
    waitForEnd(signals)
    print("trainer: served \(model.length) bytes as \(engine.name)")
  }

  /// Call before an engine starts its threads, so that the signals arrive at the descriptor.
  private static func blockSignals() throws -> Int32 {
    var signals = sigset_t()
    sigemptyset(&signals)
    sigaddset(&signals, SIGINT)
    sigaddset(&signals, SIGTERM)
    sigprocmask(SIG_BLOCK, &signals, nil)
    let descriptor = signalfd(-1, &signals, Int32(SFD_CLOEXEC))
    if descriptor < 0 { throw ExampleError.system("cannot wait for signals") }
    return descriptor
  }

  private static func waitForEnd(_ signals: Int32) {
    var status = stat()
    // A service manager, or `&` in a script, connects it to /dev/null, whose end means nothing.
    let kind = fstat(STDIN_FILENO, &status) == 0 ? status.st_mode & S_IFMT : 0
    let inputMatters = isatty(STDIN_FILENO) == 1 || kind == S_IFIFO || kind == S_IFSOCK
    var descriptors = [
      pollfd(fd: signals, events: Int16(POLLIN), revents: 0),
      pollfd(fd: inputMatters ? STDIN_FILENO : -1, events: Int16(POLLIN), revents: 0),
    ]
    var bytes = [UInt8](repeating: 0, count: 256)
    while true {
      if poll(&descriptors, 2, -1) < 0 && errno != EINTR { return }
      if descriptors[0].revents != 0 { return }
      if descriptors[1].revents != 0 && read(STDIN_FILENO, &bytes, bytes.count) <= 0 { return }
    }
  }
}
