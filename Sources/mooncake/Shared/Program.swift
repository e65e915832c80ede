import ArgumentParser
import Glibc
import MooncakeSystem

/// Where the program begins.
@main
enum Program {
  static func main() {
    // What cannot be written is an error of the write.
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

  /// Says why and ends; what was asked for, such as help, goes to stdout. What the message quotes
  /// of the arguments may be a URI with a password.
  private static func exit(_ error: any Error, _ arguments: [String]) -> Never {
    let message = ArgumentText.hidingSecrets(
      of: arguments, in: MooncakeCommand.fullMessage(for: error))
    var code = MooncakeCommand.exitCode(for: error)
    if !message.isEmpty {
      if code.isSuccess { printLine(message) } else { printError(message) }
    }
    // A command that failed may have found that nothing it printed arrived, too.
    do { try Output.check() } catch { if code.isSuccess { code = ExitCode(1) } }
    Glibc.exit(code.rawValue)
  }

  /// Else the first socket or file would take their numbers, and text would be written into it.
  private static func openStandardDescriptors() {
    for number in 0...2 where fcntl(Int32(number), F_GETFD) == -1 { _ = open("/dev/null", O_RDWR) }
  }
}
