// Publishes a file as a payload of the store and stays its holder until SIGINT or SIGTERM.
//
//   StorePublish [--bind ADDRESS] METADATA_URI NAME FILE
import Glibc
import ModelTransfer
import MooncakeEngine
import MooncakeP2P

@main
enum StorePublish {
  static func main() {
    do {
      let arguments = try Arguments(known: ["--bind"])
      guard arguments.plain.count == 3 else {
        throw ExampleError("name a metadata service, a payload and a file")
      }
      // Before the engine starts threads, so that sigwait() below receives the signals.
      var signals = sigset_t()
      sigemptyset(&signals)
      sigaddset(&signals, SIGINT)
      sigaddset(&signals, SIGTERM)
      sigprocmask(SIG_BLOCK, &signals, nil)
      // Stays mapped until the store in `publish` is closed.
      let file = try ModelFile(path: arguments.plain[2])
      try publish(file, arguments, until: &signals)
    } catch {
      exitWithFailure("store-publish", error)
    }
  }

  private static func publish(
    _ file: borrowing ModelFile, _ arguments: Arguments, until signals: inout sigset_t
  ) throws {
    var options = TransferEngine.Options()
    options.metadataURI = arguments.plain[0]
    options.bindAddress = arguments["--bind"]
    let store = try P2PStore(engineOptions: options)
    // Withdraws the payload; afterwards nobody reads the memory.
    defer { store.close() }
    let buffer = PayloadBuffer(address: file.address, length: UInt64(file.length))
    let info = try store.register(arguments.plain[1], [buffer])
    print("published \(info.name) version \(info.version!) size \(info.size)")
    fflush(nil)
    var signal: Int32 = 0
    sigwait(&signals, &signal)
  }
}
