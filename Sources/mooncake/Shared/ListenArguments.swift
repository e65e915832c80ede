import ArgumentParser
import MooncakeEngine

/// Where an engine listens; shared by the commands that start one.
struct ListenArguments: ParsableArguments {
  @Option(help: "Numeric address to listen on; 0.0.0.0 or :: for every interface.")
  var bind: String?

  @Option(help: "Host that peers connect to; default: the address listened on.")
  var advertise: String?

  @Option(help: "RPC port; 0: the system chooses.")
  var port: UInt16 = 0

  func set(_ options: inout TransferEngine.Options) {
    options.bindAddress = bind
    options.advertisedAddress = advertise
    options.port = port
  }
}
