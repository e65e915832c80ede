import ArgumentParser
import Glibc
import MooncakeSystem

/// The program's entry point.
@main
enum Program {
  static func main() {
    // A failed write is an error and not a signal.
    signal(SIGPIPE, SIG_IGN)
    signal(SIGXFSZ, SIG_IGN)
    openStandardDescriptors()
    let arguments = ArgumentText.ofProcess()
    ArgumentText.hideSecretsOfProcess()
    do {
      var command = try MooncakeCommand.parseAsRoot(arguments)
      try ArgumentText.refuseNames(in: arguments)
      try command.run()
      try Output.check()
    } catch {
      exit(error, arguments)
    }
  }

  /// Prints why and exits; requested output, such as help, goes to stdout. The message may quote a
  /// URI with a password, which is hidden.
  private static func exit(_ error: any Error, _ arguments: [String]) -> Never {
    let message = ArgumentText.hidingSecrets(
      of: arguments, in: MooncakeCommand.fullMessage(for: error))
    var code = MooncakeCommand.exitCode(for: error)
    if !message.isEmpty {
      if code.isSuccess { printLine(message) } else { printError(message) }
    }
    // Also fail if the output could not be written.
    do { try Output.check() } catch { if code.isSuccess { code = ExitCode(1) } }
    Glibc.exit(code.rawValue)
  }

  /// Otherwise the first socket or file would take their numbers, and text would be written into
  /// it.
  private static func openStandardDescriptors() {
    for number in 0...2 where fcntl(Int32(number), F_GETFD) == -1 { _ = open("/dev/null", O_RDWR) }
  }
}
